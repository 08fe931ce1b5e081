"""The ranking board: tiers with ties, for mouse, touch and keyboard.

It holds letters and numbers only. Gradio builds its HTML by evaluating a template in the browser,
so model text must never reach it (measured in 6.31: `${...}` in a value runs as code).
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from labeling_ui.assignments import Assignment

LETTERS = "ABCDEFGHI"
MAX_RESPONSES = len(LETTERS)

_TEMPLATE = """
<div class="board" role="group" aria-label="Ranking board">
 <div class="slots">
 ${[null, ...value.labels.map((_, i) => i + 1)].map(rank => `
  <div class="slot ${rank ? '' : 'pool'}" data-rank="${rank ?? ''}" role="group"
       aria-label="${rank ? 'Rank ' + rank : 'Not ranked yet'}">
   <button type="button" class="place" data-rank="${rank ?? ''}"
     aria-label="${rank ? 'Move the selected response to rank ' + rank : 'Take the selected response back'}"
     >${rank === null ? 'Not ranked' : rank === 1 ? '1 best' : rank}</button>
   ${value.labels.map((label, i) => value.ranks[i] === rank ? `
    <button type="button" class="chip" data-i="${i}" aria-pressed="${value.selected === i}"
      aria-label="Response ${label}">${label}</button>` : '').join('')}
  </div>`).join('')}
 </div>
 <div class="foot">
  <span role="status" aria-live="polite" class="said">${value.labels.length ? (
    value.ranks.includes(null)
      ? (value.selected === null || value.selected === undefined ? 'Choose a response'
         : 'Rank of ' + value.labels[value.selected] + '?')
      : 'All placed') : ''}</span>
  <button type="button" class="undo">Undo</button>
  <button type="button" class="submit" ${value.labels.length && !value.ranks.includes(null) ? '' : 'disabled'}
    >Submit</button>
 </div>
</div>
"""

# `ranked` is an event of our own: `change` also fires when Python sets the value, and would save
# the empty board of the next prompt over its draft
_BEHAVIOUR = """
let past = [];
const now = () => props.value;
const complete = () => now().labels.length > 0 && !now().ranks.includes(null);
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
};
const undo = () => { if (past.length) change(past.pop()); };
const select = (i) => { props.value = {...now(), selected: i}; };
// guarded: three quick presses must not send three orders
let sent = null;
const submit = () => {
  if (!complete() || sent === now().token) return;
  sent = now().token;
  setTimeout(() => { sent = null; }, 3000);
  trigger('submit', {});
};
watch('value', () => { past = []; sent = null; });

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
  if (chip && event.button === 0) held = {i: +chip.dataset.i, x: event.clientX, y: event.clientY, chip, moved: false};
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
  element.querySelectorAll('.slot').forEach(slot => slot.classList.toggle('over', slot === slotAt(event)));
};
const onUp = (event) => {
  if (!held) return;
  const {i, moved, chip} = held;
  held = null;
  chip.style.transform = '';
  chip.classList.remove('dragged');
  element.querySelectorAll('.over').forEach(slot => slot.classList.remove('over'));
  const slot = slotAt(event);
  if (!moved) select(i);
  else if (slot) place(i, slot.dataset.rank ? +slot.dataset.rank : null);
};
const onCancel = () => {
  if (held) { held.chip.style.transform = ''; held.chip.classList.remove('dragged'); }
  held = null;
};
const onKey = (event) => {
  if (!now().labels.length || event.altKey || event.target.closest('input, textarea, select, [contenteditable=true], [role=listbox]')) return;
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
"""

CSS = """
.board {border-top: 1px solid var(--border-color-primary); padding: 8px 0; background: var(--body-background-fill);}
.slots {display: flex; flex-wrap: wrap; gap: 6px;}
.slot {flex: 1 1 110px; min-height: 52px; display: flex; flex-wrap: wrap; gap: 6px; align-items: center;
  padding: 6px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary);}
.slot.pool {border-style: dashed; background: transparent;}
.slot.over {outline: 2px solid var(--color-accent);}
.board button {font: inherit; cursor: pointer; border-radius: 6px; color: var(--body-text-color);}
.board button:focus-visible {outline: 3px solid var(--color-accent); outline-offset: 1px;}
.place {border: 0; background: transparent; padding: 8px 4px; min-width: 32px; color: var(--body-text-color-subdued) !important; text-align: left;}
.place:hover {text-decoration: underline;}
.chip {width: 40px; height: 40px; border: 2px solid var(--border-color-accent, #999); background: var(--background-fill-primary);
  font-weight: 700 !important; touch-action: none; user-select: none;}
.chip[aria-pressed=true] {background: var(--color-accent); border-color: var(--color-accent); color: #fff !important;}
.chip.dragged {opacity: .85; z-index: 50; position: relative; pointer-events: none;}
.foot {display: flex; gap: 10px; align-items: center; margin-top: 8px;}
.said {flex: 1;}
.undo {border: 1px solid var(--border-color-primary); background: transparent; padding: 8px 12px;}
.submit {border: 0; background: var(--color-accent); color: #fff !important; padding: 9px 22px; font-weight: 600 !important;}
.submit:disabled {opacity: .4; cursor: not-allowed;}
"""


def ranking_board() -> gr.HTML:
    # a function, not a subclass: a subclass makes Gradio write a .pyi file next to this one
    return gr.HTML(
        board_value(None), html_template=_TEMPLATE, js_on_load=_BEHAVIOUR, elem_id="board"
    )


def board_value(work: Assignment | None) -> dict[str, Any]:
    """What the browser holds of an assignment: its token, letters and numbers."""
    if work is None:
        return {"token": "", "labels": [], "ranks": [], "revision": 0, "selected": None}
    ranks = list(work.draft)
    unplaced = [i for i, rank in enumerate(ranks) if rank is None]
    return {
        "token": work.token,
        "labels": list(LETTERS[: len(ranks)]),
        "ranks": ranks,
        "revision": work.draft_revision,
        "selected": unplaced[0] if unplaced else None,
    }
