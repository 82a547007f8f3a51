// What pages do with script: copying, long lines, the contents of a long answer; live.js
// is for an answer that is being written. Without script all can be read, too: a live
// page then reloads itself.
//
// When the server loads this file it leaves out comments, of which those behind code
// follow two spaces, indents, and spaces around signs that are not in a string.

const words = document.body.dataset;
const toast = document.querySelector('.toast');

// Returns the <main> of a page. Throws if there is none, or if the server is in trouble:
// whoever reads a page that is being written tries again then.
async function readMain(address, options) {
  const page = await fetch(address, options);
  const text = await page.text();
  const start = text.indexOf('<main>');
  if (page.status > 499 || start < 0) throw page.status;
  // Only this piece is parsed: the policy would complain of the page's style.
  const main = text.slice(start, text.indexOf('</main>'));
  return new DOMParser().parseFromString(main, 'text/html').body.firstChild;
}

// Says a few words at the lower edge for a moment.
function say(text) {
  toast.textContent = text;
  setTimeout(() => { toast.textContent = ''; }, 2000);
}

// Copies a text; where nothing lets it, selects its source for the reader to do it.
async function copy(text, source) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // On a page without TLS there is no clipboard. The old way needs a selection.
    const box = document.createElement('textarea');
    const focused = document.activeElement;
    box.value = text;
    box.readOnly = true;
    box.className = 'away';
    document.body.append(box);
    box.select();
    done = document.execCommand('copy');
    box.remove();
    focused.focus();
    getSelection().removeAllRanges();
    if (!done) getSelection().selectAllChildren(source);
  }
  say(done ? words.copied : words.press);
}

// What a click on a button does, by its data-do; `box` is what the button belongs to.
const deeds = {
  wrap(button, box) {
    button.setAttribute('aria-pressed', box.classList.toggle('wrapped'));
  },
  code(button, box) {
    const code = box.querySelector('code');
    copy(code.textContent, code);
  },
  table(button, box) {
    // As spreadsheets take it: a line each row, a tab between two cells.
    const table = box.querySelector('table');
    const row = ({cells}) => [...cells].map(cell => cell.innerText.replace(/\s+/g, ' '));
    copy([...table.rows].map(one => row(one).join('\t')).join('\n'), table);
  },
  all(button, box) {
    const text = box.querySelector('template').content.textContent;
    copy(text, box.querySelector('.answer'));
  },
  link(button) {
    copy(new URL(button.dataset.link, location.href).href, button);
  },
};

document.addEventListener('click', ({target}) => {
  const contents = document.querySelector('.contents[open]');
  if (contents && !contents.contains(target)) contents.open = false;
  const button = target.closest('[data-do]');
  const whole = target.closest('[data-copy]');
  if (button) deeds[button.dataset.do](button, button.closest('.code, .table, article'));
  else if (whole) copy(whole.dataset.copy, whole);
});

// Puts a round button above a long answer that opens a list of its headings.
function addContents(answer) {
  const heads = answer ? [...answer.querySelectorAll('h1, h2, h3, h4, h5, h6')] : [];
  if (heads.length < 4 || answer.offsetHeight < 2 * innerHeight) return;
  const box = document.createElement('details');
  const list = document.createElement('nav');
  box.className = 'contents';
  box.append(document.createElement('summary'), list);
  box.firstChild.textContent = list.ariaLabel = words.contents;
  for (const head of heads) {
    const button = document.createElement('button');
    button.textContent = head.textContent;
    button.className = head.localName;
    button.onclick = () => {
      box.open = false;
      head.scrollIntoView();
    };
    list.append(button);
  }
  answer.closest('main').append(box);
}

// Makes the brackets around a matrix as high as that: for want of a font for formulas most
// phones do not.
function stretch(part) {
  for (const matrix of part.querySelectorAll('mtable')) {
    const {height} = matrix.getBoundingClientRect();
    for (const sign of [matrix.previousElementSibling, matrix.nextElementSibling]) {
      if (!/^[()[\]{}|‖]$/.test(sign?.textContent)) continue;
      const times = height / sign.getBoundingClientRect().height;
      if (times > 1.2) sign.style.transform = `scaleY(${times})`;
    }
  }
}

// Gives life to what a page holds, or to an exchange that came later.
function begin(part) {
  stretch(part);
  const main = document.querySelector('main');
  addContents(main.querySelector('main > article > .answer:not(.live)'));
  for (const live of part.querySelectorAll('.live')) follow(live.closest('article'));
}

begin(document.querySelector('main'));
