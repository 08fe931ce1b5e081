// What the page knows. Model text is none of it: that is drawn by Gradio's Markdown alone.
const words = props.words;
// the page may mount the board again: the listeners of the one before must go
if (window.preflineBoard) window.preflineBoard.abort();
window.preflineBoard = new AbortController();
const signal = window.preflineBoard.signal;
const LETTERS = 'ABCDEFGHI';
let task = null;       // as the server gave it
let form = null;       // what the person says: ranks, marks, all_bad, comment, confidence, ideal
let selected = null;   // the response that a digit places
let past = [];         // forms before, for undo
let clicked = false;   // the last input came from mouse or finger

// found once, before any text of others is on the page: it may hold elements of the same name
const app = element.closest('.gradio-container') || document.body;
const all = (selector) => [...app.querySelectorAll(selector)];
const cards = all('#cards .card');
const turns = all('#prompt .turn');
const [prompt, cardRow] = [all('#prompt')[0], all('#cards')[0]];
const inside = (root, selector) => root.querySelector(`${selector} .room`);
const places = {};
for (const name of ['notices', 'tools', 'notes']) places[name] = inside(app, '.' + name);
const heads = cards.map(card => inside(card, '.head'));
const feet = cards.map(card => inside(card, '.foot'));
const turnHeads = turns.map(turn => inside(turn, '.head'));

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? '' : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
};
const button = (text, attributes = {}) => el('button', {type: 'button', ...attributes}, text);

const count = () => form ? form.ranks.length : 0;
const ranking = () => task && task.kind === 'rank';
const writing = () => task && task.kind === 'write';
const unranked = () => form.ranks.filter(rank => rank === null).length;
const tied = () => count() > 1 && !unranked() && new Set(form.ranks).size === 1;
const ready = () => Boolean(task) && (ranking() ? !unranked() || form.all_bad
  : writing() && form.ideal.trim() !== '');

// one place says what happened; a screen reader reads it out
const said = el('span', {role: 'status', 'aria-live': 'polite', class: 'said'});
const say = (text) => { said.textContent = text; };

// a change by hand: `next` holds the parts of the form that are new
const change = (next, {later = false, undoable = true} = {}) => {
  if (!task || (sending() && !trouble)) return false;
  // what could not be sent is changed: it must be submitted anew
  pending = null;
  if (undoable) past.push({form: structuredClone(form), selected});
  form = {...form, ...next};
  unconfirm();
  saveSoon(later ? 500 : 0);
  return true;
};
const undo = () => {
  if (!past.length || sending()) return;
  const before = past.pop();
  // texts have an undo of their own
  const {comment, ideal} = form;
  selected = before.selected;
  change({...before.form, comment, ideal}, {undoable: false});
  say('Undone.');
  draw();
};
const mark = (i, next) => {
  const marks = form.marks.map((old, j) => j === i ? {...old, ...next} : old);
  if (change({marks})) draw();
};

// ---- a choice of one among few, which can be taken back ---------------------------------------

const choice = (name, label, options, chosen, choose) => {
  const take = button('Clear', {class: 'clear', onclick: () => choose(null)});
  const inputs = options.map(([value, text]) => {
    const input = el('input', {type: 'radio', name, value, onchange: () => {
      choose(value);
      // after a click the keys belong to the ranking again
      if (clicked) input.blur();
    }});
    return [input, el('label', {}, input, el('span', {}, text))];
  });
  const node = el('fieldset', {class: 'choice'}, el('legend', {}, label),
    el('span', {class: 'options'}, inputs.map(([, labelled]) => labelled)), take);
  // the number itself, for who has come here with keys
  node.addEventListener('keydown', (event) => {
    const found = inputs.find(([input]) => input.value === event.key);
    if (!found || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    found[0].focus();
    choose(found[0].value);
  });
  node.show = (value) => {
    for (const [input] of inputs) input.checked = input.value === String(value);
    take.hidden = value === null;
  };
  node.show(chosen);
  return node;
};
const box = (text, checked, set) => {
  const input = el('input', {type: 'checkbox', onchange: () => {
    set(input.checked);
    if (clicked) input.blur();
  }});
  input.checked = checked;
  const node = el('label', {class: 'box'}, input, el('span', {}, text));
  node.show = (value) => { input.checked = value; };
  return node;
};
