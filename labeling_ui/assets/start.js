// Takes what the server gives and shows it.

const empty = el('div', {class: 'nothing', role: 'status', hidden: true});
element.replaceChildren(empty, board, help);
const waiting = () => {
  board.hidden = true;
  empty.hidden = false;
  app.classList.add('idle');
  empty.replaceChildren(el('p', {}, 'Loading…'));
  setTimeout(() => {
    if (task) return;
    empty.replaceChildren(
      el('strong', {}, 'The server did not send a prompt.'),
      el('p', {}, 'What you have done is kept. Reload the page; if that does not help, tell your lead.'),
      button('Reload', {class: 'submit', onclick: () => location.reload()}));
  }, WAIT);
};

const drawSubmit = () => {
  submitButton.textContent = pending ? 'Sending…' : asked ? 'All tied: submit'
    : task.editing ? 'Save the change' : 'Submit';
  // not `disabled`: it must be found by who looks for it, and says what is missing
  submitButton.setAttribute('aria-disabled', String(!ready() || (sending() && !trouble)));
};
const draw = () => {
  if (!task || !task.token) return;
  if (ranking()) { drawBoard(); drawCards(); }
  drawNotes();
  allBad.show(form.all_bad);
  undoButton.setAttribute('aria-disabled', String(!past.length));
  drawSubmit();
  drawSaved();
};
const drawNothing = () => {
  empty.hidden = Boolean(task.token);
  if (task.token) return;
  empty.replaceChildren(
    el('strong', {}, task.busy ? 'Nothing to do right now.' : 'All done.'),
    el('p', {}, task.busy ? 'Others are working on the last prompts; look again in a while.'
      : `You finished ${task.done}. Thank you!`),
    button('Look again', {class: 'submit', onclick: () => act('look')}));
};

// a form with the right number of places, or null
const fitting = (kept, given) => kept && kept.form && Array.isArray(kept.form.ranks)
  && kept.form.ranks.length === given.form.ranks.length && kept.form.marks?.length === given.form.ranks.length
  ? kept.form : null;

const adopt = (given) => {
  const first = task === null;
  task = given;
  form = given.form;
  revision = given.revision;
  pending = null;
  blocked = false;
  dirty = false;
  past = [];
  asked = false;
  active = activeBefore(given.token);
  const kept = stored.get(KEPT + given.token);
  const mine = kept && kept.who === given.who && kept.revision > given.revision && fitting(kept, given);
  if (mine) {
    form = mine;
    revision = kept.revision;
    active = Math.max(active, kept.active || 0);
    dirty = true;
  } else if (given.token) unkeep(given.token);
  const open = form.ranks.indexOf(null);
  selected = open >= 0 ? open : null;
  reasons.hidden = true;
  board.hidden = !given.token;
  board.classList.toggle('for-writing', writing());
  app.classList.toggle('writing', writing());
  app.classList.toggle('idle', !given.token);
  skipButton.hidden = given.editing;
  title.textContent = writing() ? 'Write an answer' : 'Rank responses';
  places.notes.replaceChildren();
  buildTurns();
  buildCards();
  if (given.token) { buildBoard(); buildNotes(); }
  drawProgress();
  drawLead();
  drawGuide();
  drawNotices();
  drawTrouble();
  drawNothing();
  draw();
  if (isOpen('last')) askRecent();
  if (!first) {
    window.scrollTo(0, 0);
    // where the next thing to read begins
    if (given.token) (writing() && !clicked ? notes.ideal : prompt).focus({preventScroll: true});
  } else if (writing()) notes.ideal.focus({preventScroll: true});
  if (mine && kept.pending) act('submit', kept.pending);
  else if (mine) saveNow();
};

// fires when Python sets the value, not when this code does
const answered = () => {
  const given = props.value;
  if (!given || typeof given.kind !== 'string' || !given.guidelines) return;
  const answers = flight && flight.kind === 'act' && given.answers === flight.ask;
  if (answers) landed();
  const same = task && task.token === given.token && given.token;
  if (same && given.editing === task.editing) {
    // refused, or told twice: what stands here is newer than what the server has
    if (answers) pending = null;
    if (given.said) say(given.said);
    if (dirty) saveNow();
    draw();
    return;
  }
  if (task && task.token && task.token !== given.token && !given.refused) unkeep(task.token);
  adopt(given);
  const what = given.kind === 'none' ? '' : writing() ? 'A prompt to answer.' : `${count()} responses.`;
  say([given.said, what].filter(Boolean).join(' '));
  const left = leftBehind();
  if (left && !pending) {
    // an answer that was under way when the page was reloaded
    pending = left.pending;
    revision = Math.max(revision, left.revision);
    send('act', {...left.form, ...left.pending, token: left.token});
  }
};
watch('value', answered);
waiting();
// the first one may have come before the page was whole
answered();

document.addEventListener('pointerdown', grab, {signal});
document.addEventListener('pointermove', drag, {signal});
document.addEventListener('pointerup', drop, {signal});
document.addEventListener('pointercancel', release, {signal});
document.addEventListener('keydown', onKey, {signal});
document.addEventListener('click', afterClick, {signal});
