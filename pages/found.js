// What a search found came for a form that was sent, so a browser that leaves it cannot
// come back without sending that again, and most show nothing. Hence what it leads to
// comes in its place. page.js follows this file, and its head says how both are loaded.

// Shows an exchange whole; one that is being written has its own page.
async function showWhole(link) {
  const whole = (await readMain(link.href)).querySelector('article');
  if (!whole || whole.querySelector('.live')) throw link;
  link.closest('article').replaceWith(whole);
  begin(whole);
}

// Shows what is found by other words, or what is older below what was found before.
async function search(form) {
  const body = new URLSearchParams(new FormData(form)), here = form.closest('main');
  const main = await readMain(form.action, {method: 'POST', body});
  const isMore = form.matches('.older') && main.querySelector('.found');
  if (isMore) return form.replaceWith(...main.querySelectorAll('.found, .older'));
  here.replaceChildren(...main.childNodes);
  scrollTo(0, 0);
}

document.addEventListener('click', event => {
  const link = event.target.closest('.found .typeset');
  if (!link) return;
  event.preventDefault();
  showWhole(link).catch(() => location.assign(link.href));
});

document.addEventListener('submit', event => {
  const form = event.target;
  if (!form.elements.words?.value.trim()) return;  // which leads to the history
  event.preventDefault();
  search(form).catch(() => form.submit());
});
