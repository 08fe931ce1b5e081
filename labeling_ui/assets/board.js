let past = [];
const now = () => props.value;
const complete = () => now().labels.length > 0 && !now().ranks.includes(null);
// the card of the selected response; what it holds never comes near this code
const mark = (follow) => {
  document.querySelectorAll('#cards .card').forEach((card, i) => {
    card.classList.toggle('selected', i === now().selected);
    if (follow && i === now().selected) card.scrollIntoView({block: 'nearest'});
  });
};
const change = (next) => {
  props.value = {...now(), ...next, revision: now().revision + 1};
  trigger('ranked', {});
};
const place = (i, rank) => {
  if (i === null || i === undefined || i >= now().labels.length) return;
  const ranks = [...now().ranks];
  past.push({ranks: [...ranks], selected: i});
  ranks[i] = rank;
  const count = ranks.length;
  const after = [...Array(count).keys()].map(step => (i + 1 + step) % count);
  const next = rank === null ? i : after.find(j => ranks[j] === null);
  change({ranks, selected: next === undefined ? null : next});
  mark(true);
};
const undo = () => { if (past.length) { change(past.pop()); mark(true); } };
const select = (i) => { props.value = {...now(), selected: i}; mark(true); };
// guarded: three quick presses must not send three orders
let sent = null;
const submit = () => {
  if (!complete() || sent === now().token) return;
  sent = now().token;
  setTimeout(() => { sent = null; }, 3000);
  trigger('submit', {});
};
// the cards of a new prompt are drawn after its board
const showSelected = () => [50, 300, 1000].forEach(wait => setTimeout(() => mark(false), wait));
showSelected();
let token = now().token;
// fires when Python sets the value, not when we do
watch('value', () => {
  past = [];
  sent = null;
  if (now().token !== token) window.scrollTo(0, 0);
  token = now().token;
  showSelected();
});

element.addEventListener('click', (event) => {
  const target = event.target.closest('button');
  if (!target) return;
  if (target.matches('.submit')) submit();
  else if (target.matches('.undo')) undo();
  else if (target.matches('.place')) place(now().selected, target.dataset.rank ? +target.dataset.rank : null);
  // a click without a pointer comes from Enter or Space
  else if (target.matches('.chip') && event.detail === 0) select(+target.dataset.i);
});

// pointer events work for mouse and touch; HTML5 drag events never come from touch
let held = null;
element.addEventListener('pointerdown', (event) => {
  const chip = event.target.closest('.chip');
  if (!chip || event.button !== 0) return;
  held = {i: +chip.dataset.i, x: event.clientX, y: event.clientY, chip, moved: false};
});
const slotAt = (event) => document.elementsFromPoint(event.clientX, event.clientY)
  .map(found => found.closest('.slot')).find(slot => slot && element.contains(slot));
const onMove = (event) => {
  if (!held) return;
  const dx = event.clientX - held.x, dy = event.clientY - held.y;
  if (!held.moved && Math.hypot(dx, dy) < 6) return;
  held.moved = true;
  held.chip.style.transform = `translate(${dx}px, ${dy}px)`;
  held.chip.classList.add('dragged');
  const under = slotAt(event);
  element.querySelectorAll('.slot').forEach(slot => slot.classList.toggle('over', slot === under));
};
const onUp = (event) => {
  if (!held) return;
  const {i, moved, chip} = held;
  held = null;
  // before the chip moves back: it would be what is found
  const slot = slotAt(event);
  chip.style.transform = '';
  chip.classList.remove('dragged');
  element.querySelectorAll('.over').forEach(slot => slot.classList.remove('over'));
  if (!moved) select(i);
  else if (slot) place(i, slot.dataset.rank ? +slot.dataset.rank : null);
};
const onCancel = () => {
  if (held) { held.chip.style.transform = ''; held.chip.classList.remove('dragged'); }
  held = null;
};
const onKey = (event) => {
  if (!now().labels.length || event.altKey) return;
  if (event.target.closest('input:not([type=checkbox]), textarea, select, [contenteditable=true]')) return;
  const command = event.ctrlKey || event.metaKey;
  const elsewhere = event.target.closest('button, a, summary') && !event.target.closest('.board');
  const key = event.key.toLowerCase();
  const letter = 'abcdefghi'.indexOf(key);
  if (event.key === 'Enter' && (command || !elsewhere) && complete()
      && !event.target.closest('.undo, .place')) submit();
  else if (command && key === 'z') undo();
  else if (command) return;
  else if (/^[1-9]$/.test(key) && +key <= now().labels.length) place(now().selected, +key);
  else if (key === '0' || key === 'backspace') place(now().selected, null);
  else if (key.length === 1 && letter >= 0 && letter < now().labels.length) select(letter);
  else return;
  event.preventDefault();
};
// the page may mount the board again: the listeners of the one before must go
if (window.preflineBoard) window.preflineBoard.abort();
window.preflineBoard = new AbortController();
const signal = window.preflineBoard.signal;
document.addEventListener('pointermove', onMove, {signal});
document.addEventListener('pointerup', onUp, {signal});
document.addEventListener('pointercancel', onCancel, {signal});
document.addEventListener('keydown', onKey, {signal});
