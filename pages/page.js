// What pages do with script: copy buttons, folded answers that are typeset when they are
// opened, and for an answer that is being written its blocks as they come, the seconds,
// and in the end what stands below it on the finished page; nothing that is read moves.
// Without script all can be read, too: a live page then reloads itself.
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
    if (box.querySelector('button')) continue;
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

// Makes the nodes that a box has like new ones. What stays the same is not touched, so
// that it keeps its place, how far it is scrolled, and what is selected in it.
function fill(box, nodes, fresh) {
  fresh.forEach((node, index) => {
    const old = nodes[index];
    if (!old) {
      box.append(node);
    } else if (old.data && node.data && node.data.startsWith(old.data)) {
      old.appendData(node.data.slice(old.data.length));
    } else if (!old.isEqualNode(node)) {
      const isAlike = old.firstChild && old.cloneNode().isEqualNode(node.cloneNode());
      if (isAlike) fill(old, [...old.childNodes], [...node.childNodes]);
      else old.replaceWith(node);
    }
  });
  for (const node of nodes.slice(fresh.length)) node.remove();
}

// The button that leads to the end of an answer that grows below the screen.
function endButton(live, label) {
  const button = document.createElement('button');
  button.className = 'below';
  button.textContent = label;
  button.onclick = () => scrollTo(0, document.documentElement.scrollHeight);
  button.place = () => {
    button.hidden = live.getBoundingClientRect().bottom <= innerHeight;
  };
  addEventListener('scroll', button.place, {passive: true});
  button.place();
  live.after(button);
  return button;
}

// Shows an answer in `live` as it is written, and how it goes on in `note`.
function follow(live, note) {
  const [state, time] = note.children;
  const began = Date.now() - 1000 * note.dataset.seconds;
  const button = endButton(live, note.dataset.below);
  const source = new EventSource(location.pathname + '/events');
  const clock = setInterval(() => {
    time.textContent = Math.round((Date.now() - began) / 1000) + ' ' + words.seconds;
  }, 1000);
  let said = state.textContent;  // while the line holds

  function say(line) {
    if (said !== line) state.textContent = said = line;
  }

  // Goes on with the page that the server has after a pause.
  function leave(pause) {
    source.close();
    clearInterval(clock);
    removeEventListener('scroll', button.place);
    button.remove();
    setTimeout(renew, pause);
  }

  source.onmessage = event => {
    const {keep, html, more} = JSON.parse(event.data);
    const page = document.documentElement;
    const isAtEnd = scrollY > 0 && innerHeight + scrollY >= page.scrollHeight - 80;
    const fresh = new DOMParser().parseFromString(html.join(''), 'text/html').body;
    addCopyButtons(fresh);
    // Nothing is taken away while more is on its way.
    const end = more ? keep + html.length : live.children.length;
    fill(live, [...live.children].slice(keep, end), [...fresh.children]);
    if (live.firstElementChild) {
      clearInterval(clock);
      time.textContent = '';
      say(words.writing);
    } else {
      say(note.dataset.waiting);
    }
    if (isAtEnd) scrollTo(0, page.scrollHeight);
    button.place();
  };
  source.addEventListener('queued', event => {
    say(JSON.parse(event.data).queued ? note.dataset.queued : note.dataset.waiting);
  });
  source.addEventListener('done', () => leave(0));
  source.onopen = () => { state.textContent = said; };
  source.onerror = () => {
    state.textContent = note.dataset.lost;
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

function following(node) {
  const all = [...node.parentNode.childNodes];
  return all.slice(all.indexOf(node) + 1);
}

// Goes on with a newer state of the page around the answer, which stays where it is.
// Returns the <main> that is shown then.
function take(main) {
  const old = document.querySelector('main');
  const live = old.querySelector('.live'), answer = main.querySelector('.answer');
  const note = old.querySelector('.asking');
  if (!answer) {
    old.replaceWith(main);
    return main;
  }
  addCopyButtons(answer);
  fill(live, [...live.children], [...answer.children]);
  live.className = answer.className;
  const late = following(answer);
  for (const node of following(live)) if (node !== note) node.remove();
  note.after(...late);
  if (late.some(node => node.matches?.('.asking, .failed'))) {
    note.remove();
  } else {
    // Over the page and for a moment, so that nothing moves.
    note.className = 'written';
    note.lastElementChild.remove();
    note.firstElementChild.textContent = note.dataset.written;
    setTimeout(() => note.remove(), 4000);
  }
  return old;
}

// Takes over what the page shows by now; the address stays, and so does the scrolling.
async function renew() {
  try {
    begin(take(await readMain(location.href)));
  } catch {
    setTimeout(renew, 3000);
  }
}

begin(document.querySelector('main'));
