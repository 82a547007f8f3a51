// What a page does for an answer that is being written: its blocks as they come, the
// seconds, and in the end what stands below it on the finished page; nothing that is
// read moves. page.js follows this file, and its head says how both are loaded.

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
    button.hidden = live.getBoundingClientRect().bottom <= edge();
  };
  addEventListener('scroll', button.place, {passive: true});
  button.place();
  live.after(button);
  return button;
}

// Returns where the screen ends for what is read: where one asks, if that is at its foot.
function edge() {
  const form = document.querySelector('.ask');
  return innerHeight - (form ? form.offsetHeight : 0);
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
    const isAtEnd = scrollY > 0 && before <= edge() + 80;
    const fresh = new DOMParser().parseFromString(html.join(''), 'text/html').body;
    // Nothing is taken away while more is on its way.
    const last = more ? keep + html.length : live.children.length;
    fill(live, [...live.children].slice(keep, last), [...fresh.children]);
    stretch(live);
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
    for (const node of following(old.firstElementChild)) node.remove();
    old.append(...following(fresh.firstElementChild));
    return;
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
}

async function renew(article) {
  try {
    const main = await readMain(article.dataset.page);
    const fresh = main.querySelector('article');
    // Without one the exchange is gone, and the page says why.
    if (!fresh) return article.replaceWith(...main.children);
    take(article, fresh);
    begin(article);
  } catch {
    setTimeout(() => renew(article), 3000);
  }
}
