// The board: a place for each rank, and a letter for each response that moves between them.

let chips = [], slots = [];
const pool = () => slots[0];
const tiers = el('div', {class: 'slots', role: 'group', 'aria-label': 'Ranks'});
const undoButton = button('Undo', {class: 'quiet undo', onclick: () => undo()});
const skipButton = button('Skip', {class: 'quiet skip', 'aria-expanded': 'false', onclick: () => openSkip()});
const submitButton = button('Submit', {class: 'submit', onclick: () => submit()});
const saved = el('span', {class: 'saved'});
const allBad = box('All bad', false, (on) => {
  if (change({all_bad: on})) say(on ? 'All bad: the ranks are optional now.' : '');
  draw();
});
allBad.classList.add('all-bad');
const reasons = el('div', {class: 'reasons', role: 'group', 'aria-label': 'Why do you skip this prompt?', hidden: true},
  el('span', {class: 'why'}, 'Skip, because'),
  Object.entries(words.reasons).map(([key, text], i) =>
    button('', {class: 'reason', 'data-reason': key, onclick: () => skip(key)})),
  button('Cancel', {class: 'quiet', onclick: () => closeSkip()}));
[...reasons.querySelectorAll('.reason')].forEach((node, i) =>
  node.append(el('kbd', {}, String(i + 1)), Object.values(words.reasons)[i]));
const board = el('div', {class: 'board', role: 'region', 'aria-label': 'Ranking board', hidden: true},
  tiers, reasons,
  el('div', {class: 'foot'}, said, saved, allBad, undoButton, skipButton, submitButton));

const slotName = (rank) => rank === null ? 'Not ranked' : `Rank ${rank}`;
const buildBoard = () => {
  chips = form.ranks.map((_, i) => button(LETTERS[i], {class: 'chip', 'data-i': i}));
  slots = [null, ...form.ranks.map((_, i) => i + 1)].map(rank => {
    const text = rank === null ? 'Not ranked'
      : rank === 1 && count() < 6 ? ['1', el('span', {class: 'best'}, ' best')] : String(rank);
    return el('div', {class: rank === null ? 'slot pool' : 'slot', 'data-rank': rank ?? '', role: 'group', 'aria-label': slotName(rank)},
      button(text, {class: 'place', tabindex: '-1'}));
  });
  tiers.replaceChildren(...slots);
  tiers.classList.toggle('many', count() > 5);
};
const drawBoard = () => {
  const focused = document.activeElement;
  form.ranks.forEach((rank, i) => {
    const slot = slots[rank ?? 0], chip = chips[i];
    if (chip.parentNode !== slot) {
      const after = [...slot.querySelectorAll('.chip')].find(other => +other.dataset.i > i);
      slot.insertBefore(chip, after || null);
    }
    chip.setAttribute('aria-pressed', String(i === selected));
    chip.setAttribute('aria-label', `Response ${LETTERS[i]}, ${slotName(rank).toLowerCase()}`);
  });
  slots.forEach((slot, rank) => {
    const place = slot.querySelector('.place');
    place.setAttribute('aria-label', selected === null ? slotName(rank || null)
      : rank ? `Put ${LETTERS[selected]} on rank ${rank}` : `Take ${LETTERS[selected]} back`);
  });
  // moving an element takes the focus from it
  if (focused && focused !== document.activeElement && chips.includes(focused)) focused.focus({preventScroll: true});
};

// ---- ranking -----------------------------------------------------------------------------------

const place = (i, rank) => {
  if (i === null || i >= count() || (rank !== null && rank > count())) return;
  const ranks = form.ranks.map((old, j) => j === i ? rank : old);
  const after = ranks.map((_, step) => (i + 1 + step) % ranks.length);
  if (!change({ranks})) return;
  const next = rank === null ? i : after.find(j => ranks[j] === null);
  selected = next === undefined ? null : next;
  const where = rank === null ? `${LETTERS[i]} is not ranked.` : `${LETTERS[i]} on rank ${rank}.`;
  say(selected === null ? `${where} All placed: Enter submits.`
    : rank === null ? where : `${where} Rank of ${LETTERS[selected]}?`);
  draw();
  follow();
};
const select = (i) => {
  selected = i;
  say(`Rank of ${LETTERS[i]}?`);
  draw();
  follow();
};
const follow = () => {
  if (selected !== null) cards[selected].scrollIntoView({block: 'nearest'});
};

// ---- submitting and skipping -------------------------------------------------------------------

let pressed = 0;       // when Submit was last pressed, with nothing changed since
let asked = false;     // whether it was asked if everything is equally good
const unconfirm = () => {
  asked = false;
  pressed = 0;
};
const submit = () => {
  // the second half of a double click must not answer for what has come in between
  const twice = Date.now() - pressed < 500;
  pressed = Date.now();
  if (!task || sending() || twice) return;
  if (!ready()) {
    const open = unranked();
    say(writing() ? 'Write an answer first.'
      : `${open} ${open === 1 ? 'response is' : 'responses are'} not ranked yet.`);
    return;
  }
  if (ranking() && tied() && !form.all_bad && !asked) {
    asked = true;
    say('All on one rank: submit again if they are equally good.');
    draw();
    return;
  }
  act('submit', {submission: uuid()});
};
const openSkip = () => {
  if (!task.token || sending() || task.editing) return;
  reasons.hidden = !reasons.hidden;
  skipButton.setAttribute('aria-expanded', String(!reasons.hidden));
  if (!reasons.hidden) reasons.querySelector('.reason').focus();
};
const closeSkip = () => {
  reasons.hidden = true;
  skipButton.setAttribute('aria-expanded', 'false');
  skipButton.focus();
};
const skip = (reason) => {
  reasons.hidden = true;
  skipButton.setAttribute('aria-expanded', 'false');
  act('skip', {reason});
};

// ---- mouse and touch: pointer events work for both, HTML5 drags never come from touch ----------

let held = null;
const grab = (event) => {
  const chip = event.target.closest('[data-i]');
  if (!chip || event.button !== 0 || !ranking()) return;
  held = {i: +chip.dataset.i, x: event.clientX, y: event.clientY, chip, ghost: null};
  // a finger holds what it touched; the slot under it is found by its place
  if (chip.hasPointerCapture?.(event.pointerId)) chip.releasePointerCapture(event.pointerId);
};
const slotAt = (event) => document.elementsFromPoint(event.clientX, event.clientY)
  .map(found => found.closest('.slot')).find(slot => slot && slots.includes(slot));
const drag = (event) => {
  if (!held) return;
  if (!held.ghost) {
    if (Math.hypot(event.clientX - held.x, event.clientY - held.y) < 6) return;
    held.ghost = el('span', {class: 'chip ghost', 'aria-hidden': 'true'}, LETTERS[held.i]);
    board.append(held.ghost);
    held.chip.classList.add('dragged');
  }
  held.ghost.style.left = `${event.clientX - 20}px`;
  held.ghost.style.top = `${event.clientY - 20}px`;
  const under = slotAt(event);
  slots.forEach(slot => slot.classList.toggle('over', slot === under));
};
const release = () => {
  if (held && held.ghost) held.ghost.remove();
  if (held) held.chip.classList.remove('dragged');
  slots.forEach(slot => slot.classList.remove('over'));
  held = null;
};
const drop = (event) => {
  if (!held) return;
  const {i, ghost} = held;
  const slot = ghost && slotAt(event);
  release();
  if (ghost) dropped = Date.now();
  if (!ghost) select(i);
  else if (slot) place(i, slot.dataset.rank ? +slot.dataset.rank : null);
};
let dropped = 0;
tiers.addEventListener('click', (event) => {
  // the end of a drag is a click on what both ends share
  if (Date.now() - dropped < 100) return;
  const target = event.target.closest('.place');
  const slot = event.target.closest('.slot');
  // a click without a pointer comes from Enter or Space
  if (event.target.closest('.chip')) { if (event.detail === 0) select(+event.target.closest('.chip').dataset.i); }
  else if (target || slot) place(selected, slot.dataset.rank ? +slot.dataset.rank : null);
});
