// Goes on when the number that the page shows was confirmed, or is over. page.js follows
// this file, and its head says how both are loaded.

async function wait() {
  const main = await readMain('me').catch(() => null);
  if (main && !main.querySelector('.number')) location.replace('me');
  else setTimeout(wait, 3000);
}

if (document.querySelector('.number')) setTimeout(wait, 3000);
