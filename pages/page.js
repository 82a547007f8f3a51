// What pages do with script: copy buttons, folded answers that are typeset when they are
// opened, and for an answer that is being written the stream, the seconds, and in the
// end the finished page's content in place of this one's, without a jump. Without script
// all can be read, too: a live page then reloads itself.
//
// When the server loads this file it leaves out lines that are only a comment, and the
// indentation, so no text in here may go over the end of a line.

const words = document.body.dataset;

// Returns the <main> of a page. Throws if there is none, or if the server is in trouble:
// whoever reads a page that is being written tries again then.
async function readMain(address) {
  const page = await fetch(address);
  const text = await page.text();
  const start = text.indexOf('<main>');
  if (page.status > 499 || start < 0) throw page.status;
  // Only this piece is parsed: the policy would complain of the page's style.
  const main = text.slice(start, text.indexOf('</main>'));
  return new DOMParser().parseFromString(main, 'text/html').body.firstChild;
}

function addCopyButtons(part) {
  for (const box of part.querySelectorAll('.code')) {
    const code = box.querySelector('code');
    const button = document.createElement('button');
    button.textContent = words.copy;
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        // On a page without TLS there is no clipboard. The old way needs a selection;
        // if even that fails, the code is selected at least.
        getSelection().selectAllChildren(code);
        if (!document.execCommand('copy')) return;
      }
      button.textContent = words.copied;
      setTimeout(() => { button.textContent = words.copy; }, 2000);
    };
    box.firstChild.append(button);
  }
}

// Puts the typeset answer in place of the plain text that was folded away.
async function typeset(box) {
  const link = box.querySelector('.typeset');
  const answer = (await readMain(link.href)).querySelector('.answer');
  if (!answer) return;
  box.querySelector('.answer').replaceWith(answer);
  link.remove();
  addCopyButtons(answer);
}

// Shows an answer in `live` as it is written, and how it goes on in `note`.
function follow(live, note) {
  const [state, time] = note.children;
  const began = Date.now() - 1000 * note.dataset.seconds;
  let isFresh = true;  // until the stream's first text replaces what came with the page
  const source = new EventSource(location.pathname + '/events');
  const clock = setInterval(() => {
    time.textContent = Math.round((Date.now() - began) / 1000) + ' ' + words.seconds;
  }, 1000);

  function clear() {
    // It keeps its height until it is full again, so that nothing below it jumps.
    live.style.minHeight = live.offsetHeight + 'px';
    live.textContent = '';
    isFresh = false;
  }

  function leave(pause) {
    source.close();
    clearInterval(clock);
    setTimeout(renew, pause);
  }

  source.onmessage = event => {
    if (isFresh) clear();
    live.append(JSON.parse(event.data).text);
    clearInterval(clock);
    state.textContent = words.writing;
    time.textContent = '';
  };
  source.addEventListener('reset', clear);
  source.addEventListener('done', () => leave(0));
  source.onerror = () => {
    // A stream that broke is opened again by the browser; this one it has given up.
    if (source.readyState === EventSource.CLOSED) leave(3000);
  };
}

function begin(main) {
  const live = main.querySelector('.live');
  addCopyButtons(main);
  for (const box of main.querySelectorAll('details')) {
    // Without the typeset answer there is still its text, and the link.
    const open = () => typeset(box).catch(() => {});
    box.addEventListener('toggle', open, {once: true});
  }
  if (live) follow(live, main.querySelector('.asking'));
}

// Takes over what the page shows by now; the address stays, and so does the scrolling.
async function renew() {
  try {
    const main = await readMain(location.href);
    document.querySelector('main').replaceWith(main);
    begin(main);
  } catch {
    setTimeout(renew, 3000);
  }
}

begin(document.querySelector('main'));
