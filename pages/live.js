// What a page does for an answer that is being written: its blocks as they come, the
// seconds, and in the end what stands below it on the finished page; nothing that is
// read moves. On one's own page also what asks. page.js follows this file, and its head
// says how both are loaded.

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

// Shows an answer as it is written, and how it goes on.
function follow(article) {
  const live = article.querySelector('.live'), note = article.querySelector('.asking');
  const [state, time] = note.children;
  const began = Date.now() - 1000 * note.dataset.seconds;
  const button = endButton(live, note.dataset.below);
  const source = new EventSource(article.dataset.page + '/events');
  const clock = setInterval(() => {
    time.textContent = Math.round((Date.now() - began) / 1000) + ' ' + words.seconds;
  }, 1000);
  let said = state.textContent;  // while the line holds

  function tell(line) {
    if (said !== line) state.textContent = said = line;
  }

  // Goes on with what the server has after a pause.
  function leave(pause) {
    source.close();
    clearInterval(clock);
    removeEventListener('scroll', button.place);
    button.remove();
    setTimeout(() => renew(article), pause);
  }

  source.onmessage = event => {
    const {keep, html, more} = JSON.parse(event.data);
    const end = () => article.getBoundingClientRect().bottom;
    const before = end();
    const isAtEnd = scrollY > 0 && before <= innerHeight + 80;
    const fresh = new DOMParser().parseFromString(html.join(''), 'text/html').body;
    // Nothing is taken away while more is on its way.
    const last = more ? keep + html.length : live.children.length;
    fill(live, [...live.children].slice(keep, last), [...fresh.children]);
    if (live.firstElementChild) {
      clearInterval(clock);
      time.textContent = '';
      tell(words.writing);
    } else {
      tell(note.dataset.waiting);
    }
    if (isAtEnd) scrollBy(0, end() - before);
    button.place();
  };
  source.addEventListener('queued', event => {
    tell(JSON.parse(event.data).queued ? note.dataset.queued : note.dataset.waiting);
  });
  source.addEventListener('done', () => leave(0));
  source.onopen = () => { state.textContent = said; };
  source.onerror = () => {
    state.textContent = note.dataset.lost;
    // A stream that broke is opened again by the browser; this one it has given up.
    if (source.readyState === EventSource.CLOSED) leave(3000);
  };
}

function following(node) {
  const all = [...node.parentNode.childNodes];
  return all.slice(all.indexOf(node) + 1);
}

// Takes over what the server shows of an exchange by now; its answer stays in its place.
function take(old, fresh) {
  const live = old.querySelector('.live'), answer = fresh.querySelector('.answer');
  const note = old.querySelector('.asking');
  if (!answer) {
    old.replaceWith(fresh);
    return fresh;
  }
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

async function renew(article) {
  try {
    const main = await readMain(article.dataset.page);
    const fresh = main.querySelector('article');
    // Without one the exchange is gone, and the page says why.
    if (fresh) begin(take(article, fresh));
    else article.replaceWith(...main.children);
  } catch {
    setTimeout(() => renew(article), 3000);
  }
}

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
  if (!section.parentNode) document.querySelector('.empty').replaceWith(section);
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
