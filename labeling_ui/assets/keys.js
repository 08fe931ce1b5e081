// One key for each step of the way. Nothing fires while somebody writes or sets a control.

const FIELDS = 'input:not([type=checkbox]), textarea, select, [contenteditable], [role=slider], [role=textbox]';
const comment = () => {
  notes.folded.open = true;
  notes.comment.focus();
};
const onKey = (event) => {
  if (!task || help.open || event.altKey || event.isComposing) return;
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  const field = event.target.closest(FIELDS);
  const control = event.target.closest('button, a, summary, input');
  const letter = key.length === 1 ? LETTERS.toLowerCase().indexOf(key) : -1;
  if (key === 'enter' && event.repeat) { if (!field) event.preventDefault(); return; }
  if (key === 'enter' && command) submit();
  else if (key === 'escape') {
    if (field) field.blur();
    else if (!reasons.hidden) closeSkip();
    else if (isOpen('guide')) openSide('guide', false);
    else if (isOpen('last')) openSide('last', false);
    else return;
  } else if (field) return;
  else if (!reasons.hidden && /^[1-9]$/.test(key)) reasons.querySelectorAll('.reason')[+key - 1]?.click();
  else if (key === '?') help.showModal();
  else if (command && key === 'z' && !event.shiftKey) undo();
  else if (command) return;
  else if (key === 'm') setAllLooks(look === 'rendered' ? 'exact' : 'rendered');
  else if (!task.token) return;
  else if (key === 's') openSkip();
  else if (key === 'n') comment();
  else if (!ranking()) return;
  else if (key === 'enter') {
    // a button that has the focus is meant; a letter of the board is not pressed to be chosen twice
    if (control && !(event.target.closest('.chip') && ready())) return;
    submit();
  } else if (/^[1-9]$/.test(key)) { if (+key > count()) say(`There are ${count()} ranks.`); else place(selected, +key); }
  else if (key === '0' || key === 'backspace') place(selected, null);
  else if (key === 'x') allBad.querySelector('input').click();
  else if (key === 'o' && selected !== null) {
    openMarks(selected, true);
    parts[selected].foot.querySelector('input').focus();
  } else if (letter >= 0 && letter < count()) select(letter);
  else return;
  event.preventDefault();
  // who ranks with keys has left the button that was pressed before: Enter must not press it again
  if (control && control === document.activeElement && /^[0-9a-ix]$/.test(key) && !control.matches('.chip')) control.blur();
};
// the same after a click: a button that was clicked does not keep the keys
const afterClick = (event) => {
  const pressed = event.target.closest('button, summary');
  if (pressed && event.detail > 0 && pressed === document.activeElement) pressed.blur();
};
