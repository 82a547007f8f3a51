// What a page does for its reader who is signed in: asks, and stops an answer, without
// leaving it. page.js follows this file, and its head says how both are loaded; where
// answers are shown live.js goes with them.

async function post(form) {
  const body = new URLSearchParams(new FormData(form));
  const headers = {Accept: 'application/json'}, signal = AbortSignal.timeout(30_000);
  return (await fetch(form.action, {method: 'POST', body, headers, signal})).json();
}

// Shows a question at once, and its answer in its place; what is refused stays in the
// field, with the reason. `source` is the form that has the question.
async function ask(form, source) {
  const {question, id} = source.elements, field = form.elements.question;
  const draft = document.createElement('article');
  const section = document.querySelector('section') ?? document.createElement('section');
  for (const old of form.querySelectorAll('.failed')) old.remove();
  draft.innerHTML = '<h3 class="question"></h3><p class="asking"></p>';
  [draft.firstChild.textContent, draft.lastChild.textContent] =
    [question.value, form.dataset.sending];
  if (!section.parentNode) form.before(section);
  document.querySelector('.empty')?.remove();
  section.append(draft);
  draft.scrollIntoView({block: 'end'});
  form.inert = source.inert = true;
  try {
    const {key, session, error} = await post(source);
    if (error) throw error;
    const page = source.action.replace(/me\/ask$/, 'a/' + key);
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
    if (source === form) field.value = '';
    id.value = crypto.randomUUID();  // until then the same words join the first
  } catch (error) {
    draft.remove();
    const why = document.createElement('p');
    why.className = 'failed';
    why.role = 'alert';
    why.textContent = typeof error === 'string' ? error : form.dataset.failed;
    form.prepend(why);
  }
  form.inert = source.inert = false;
  grow();
  field.focus();
}

const foot = document.querySelector('.ask');

// Makes the field as high as its text where the browser does not.
function grow() {
  if (CSS.supports('field-sizing', 'content')) return;
  const field = foot.elements.question;
  field.style.height = '';
  field.style.height = field.scrollHeight + 2 + 'px';
}

foot.addEventListener('input', grow);

// What stands over the page stays above the field.
new ResizeObserver(() => {
  document.documentElement.style.setProperty('--foot', foot.offsetHeight + 'px');
}).observe(foot);

document.addEventListener('submit', event => {
  const form = event.target;
  const isHere = form.matches('.ask, .again') && document.querySelector('.menu');
  if (!isHere && !form.matches('.stop')) return;
  event.preventDefault();
  if (isHere) ask(foot, form);
  else post(form).catch(() => say(foot.dataset.failed));
});

document.addEventListener('keydown', event => {
  // On a keyboard Enter sends, unless it chooses a word that is being written.
  const isEnter = event.key === 'Enter' && !event.shiftKey && !event.isComposing;
  if (!isEnter || !event.target.matches('.ask textarea')) return;
  if (!matchMedia('(pointer: fine)').matches) return;
  event.preventDefault();
  event.target.form.requestSubmit();
});
