// What a history does with answers that are folded: one is typeset when it is opened, and
// is open again when its reader comes back to the page. page.js follows this file, and
// its head says how both are loaded.

// Puts the typeset answer in place of the plain text that was folded away.
async function typeset(fold) {
  const link = fold.querySelector('.typeset'), page = await readMain(link.href);
  const answer = page.querySelector('.answer');
  if (!answer) return;
  link.previousElementSibling.replaceWith(answer);
  link.replaceWith(page.querySelector('.actions'));
  begin(answer);
}

const was = history.state;
const folds = [...document.querySelectorAll('details[id]')];
// A fold may tell that it is open before page.js, which fetches, is there.
const ready = new Promise(done => addEventListener('DOMContentLoaded', done));
// Without the typeset answer there is still its text, and the link.
const shown = folds.map(fold => new Promise(done => {
  const show = () => ready.then(() => typeset(fold)).catch(() => {}).then(done);
  fold.addEventListener('toggle', show, {once: true});
  fold.open = was?.open.includes(fold.id);
  if (!fold.open) done();
}));
if (was) Promise.all(shown).then(() => scrollTo(0, was.y));

// Its place is forgotten when it has been found, by this file or by the browser itself.
addEventListener('pageshow', () => history.replaceState(null, ''));

document.addEventListener('click', ({target}) => {
  if (!target.closest('a')) return;
  const open = folds.filter(fold => fold.open).map(fold => fold.id);
  history.replaceState({open, y: scrollY}, '');
});
