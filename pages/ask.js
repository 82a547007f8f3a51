// What a page does for its reader who is signed in: asks, and stops an answer, without
// leaving it. live.js and page.js go with this file; page.js says how they are loaded.

async function post(form) {
  const body = new URLSearchParams(new FormData(form));
  const headers = {Accept: 'application/json'};
  return (await fetch(form.action, {method: 'POST', body, headers})).json();
}

// Shows a question at once, and its answer in its place; what is refused stays in the
// field, with the reason.
async function ask(form) {
  const field = form.elements.question, id = form.elements.id;
  const draft = document.createElement('article');
  const section = document.querySelector('section') ?? document.createElement('section');
  for (const old of form.querySelectorAll('.failed')) old.remove();
  draft.innerHTML = '<h3 class="question"></h3><p class="asking"></p>';
  [draft.firstChild.textContent, draft.lastChild.textContent] =
    [field.value, form.dataset.sending];
  if (!section.parentNode) form.before(section);
  document.querySelector('.empty')?.remove();
  section.append(draft);
  draft.scrollIntoView({block: 'end'});
  form.inert = true;
  try {
    const {key, session, error} = await post(form);
    if (error) throw error;
    const page = form.action.replace(/me\/ask$/, 'a/' + key);
    const article = (await readMain(page)).querySelector('article');
    const title = article.querySelector('h1'), smaller = document.createElement('h3');
    smaller.className = title.className;
    smaller.append(...title.childNodes);
    title.replaceWith(smaller);
    if (section.dataset.session !== session) {
      const begun = document.createElement('section');
      begun.dataset.session = session;
      section.before(begun);
      begun.append(draft);
    }
    draft.replaceWith(article);
    begin(article);
    article.scrollIntoView({block: 'nearest'});
    field.value = '';
    id.value = crypto.randomUUID();  // until then the same words join the first
  } catch (error) {
    draft.remove();
    const why = document.createElement('p');
    why.className = 'failed';
    why.role = 'alert';
    why.textContent = typeof error === 'string' ? error : form.dataset.failed;
    form.prepend(why);
  }
  form.inert = false;
  field.focus();
}

document.addEventListener('submit', event => {
  const form = event.target;
  const isHere = form.matches('.ask') && document.querySelector('.menu');
  if (!isHere && !form.matches('.stop')) return;
  event.preventDefault();
  if (isHere) ask(form);
  else post(form).catch(() => say(document.querySelector('.ask').dataset.failed));
});

document.addEventListener('keydown', event => {
  // On a keyboard Enter sends, unless it chooses a word that is being written.
  const isEnter = event.key === 'Enter' && !event.shiftKey && !event.isComposing;
  if (!isEnter || !event.target.matches('.ask textarea')) return;
  if (!matchMedia('(pointer: fine)').matches) return;
  event.preventDefault();
  event.target.form.requestSubmit();
});
