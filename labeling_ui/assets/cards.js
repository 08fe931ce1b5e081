// What surrounds the texts: a head and a foot for each response, a head for each turn of the prompt,
// and the notes on the whole task. The texts themselves are never touched.

let look = stored.get('prefline-look') === 'rendered' ? 'rendered' : 'exact';
let parts = [];        // of each card: what `draw` must keep up to date

// how a card or a turn shows its text
const setLook = (node, way) => {
  node.classList.toggle('as-rendered', way === 'rendered');
  const toggle = node.toggle;
  if (toggle) toggle.setAttribute('aria-pressed', String(way === 'rendered'));
};
const setAllLooks = (way) => {
  look = way;
  stored.set('prefline-look', way);
  for (const node of [...cards, ...turns]) setLook(node, way);
  looks.setAttribute('aria-pressed', String(way === 'rendered'));
};
const lookOf = (node) => node.classList.contains('as-rendered') ? 'rendered' : 'exact';

const ordinal = (rank) => rank === 1 ? 'Best' : `Rank ${rank}`;
const buildCard = (i) => {
  const badge = el('span', {class: 'rank'});
  const marks = el('span', {class: 'marks'});
  const more = button('Score, flags', {class: 'quiet', 'aria-expanded': 'false', 'aria-controls': `marks-${i}`,
    'aria-label': `Score and flags of ${LETTERS[i]}`, onclick: () => openMarks(i, foot.hidden)});
  const toggle = button('Markdown', {class: 'quiet', 'aria-label': `${LETTERS[i]} as Markdown`,
    onclick: () => setLook(cards[i], lookOf(cards[i]) === 'exact' ? 'rendered' : 'exact')});
  const score = choice(`score-${i}`, 'Score', words.scores.map(x => [x, String(x)]), null, (value) => {
    mark(i, {score: value === null ? null : +value});
  });
  score.querySelector('.options').append(el('span', {class: 'ends'}, '1 poor, 7 excellent'));
  const flags = Object.entries(words.flags).map(([key, text]) => [key, box(text, false, (on) => {
    const others = form.marks[i].flags.filter(flag => flag !== key);
    mark(i, {flags: on ? [...others, key] : others});
  })]);
  const foot = el('div', {class: 'more', id: `marks-${i}`, hidden: true}, score,
    el('fieldset', {class: 'flags'}, el('legend', {}, 'Flags'), flags.map(([, node]) => node)));
  cards[i].toggle = toggle;
  cards[i].setAttribute('role', 'group');
  cards[i].setAttribute('aria-label', `Response ${LETTERS[i]}`);
  heads[i].replaceChildren(
    el('span', {class: 'letter', 'data-i': i, title: 'Drag to a rank'}, LETTERS[i]), badge, marks,
    el('span', {class: 'grow'}), more, toggle);
  feet[i].replaceChildren(foot);
  for (const text of cards[i].querySelectorAll('.block.text')) {
    text.setAttribute('tabindex', '0');
    text.setAttribute('role', 'region');
    text.setAttribute('aria-label', `Text of response ${LETTERS[i]}`);
    text.scrollTop = 0;
  }
  setLook(cards[i], look);
  return {badge, marks, more, score, flags, foot};
};
const openMarks = (i, open) => {
  parts[i].foot.hidden = !open;
  parts[i].more.setAttribute('aria-expanded', String(open));
};
const buildCards = () => {
  parts = form.ranks.map((_, i) => buildCard(i));
  cards.forEach((card, i) => { card.hidden = i >= count(); card.classList.toggle('shown', i < count()); });
  cardRow.dataset.count = count();
};
const drawCards = () => parts.forEach(({badge, marks, score, flags}, i) => {
  const rank = form.ranks[i];
  const same = form.ranks.filter(other => other === rank).length;
  badge.textContent = rank === null ? '' : ordinal(rank) + (same > 1 ? ', tied' : '');
  cards[i].classList.toggle('selected', i === selected);
  const mark = form.marks[i];
  score.show(mark.score);
  for (const [key, node] of flags) node.show(mark.flags.includes(key));
  marks.textContent = [mark.score === null ? null : `${mark.score} of 7`,
    ...mark.flags.map(flag => `⚑ ${words.flags[flag]}`)].filter(Boolean).join(' · ');
});
// a click into a response selects it, unless it was made to select or scroll something
cardRow.addEventListener('click', (event) => {
  const i = cards.indexOf(event.target.closest('.card'));
  const used = event.target.closest('button, input, label, a, .letter');
  if (i >= 0 && i < count() && !used && String(getSelection()) === '') {
    selected = i;
    draw();
  }
}, {signal});

// ---- the prompt --------------------------------------------------------------------------------

const OPEN_TURNS = 3;
const buildTurns = () => {
  const shown = task.turns.length;
  turns.forEach((turn, i) => {
    const there = i < shown;
    turn.classList.toggle('shown', there);
    setLook(turn, look);
    turnHeads[i].replaceChildren();
    turn.classList.remove('closed');
    // a single turn needs no name above it
    if (!there || shown === 1) return;
    const fold = button(task.turns[i], {class: 'turn-head', onclick: () => {
      const closed = turn.classList.toggle('closed');
      fold.setAttribute('aria-expanded', String(!closed));
    }});
    const closed = i < shown - 1 && shown > OPEN_TURNS;
    turn.classList.toggle('closed', closed);
    fold.setAttribute('aria-expanded', String(!closed));
    turnHeads[i].append(fold);
  });
  prompt.setAttribute('role', 'region');
  prompt.setAttribute('aria-label', 'Prompt');
  prompt.setAttribute('tabindex', '0');
  // the newest turn is what is answered
  setTimeout(() => { prompt.scrollTop = shown > 1 ? prompt.scrollHeight : 0; }, 50);
};

// ---- notes on the task -------------------------------------------------------------------------

let notes = null;
const textBox = (name, label, rows, hint) => {
  const area = el('textarea', {id: `text-${name}`, rows, maxlength: words.longest[name], oninput: () => {
    const next = {[name]: area.value};
    if (!change(next, {later: true, undoable: false})) form = {...form, ...next};
    drawSubmit();
  }});
  // never through a template: what is set here is text
  area.value = form[name];
  return {area, node: el('div', {class: 'field'},
    el('label', {for: area.id}, label, hint ? el('span', {class: 'hint'}, hint) : null), area)};
};
const buildNotes = () => {
  const comment = textBox('comment', 'Comment', 2, 'for the lead');
  const ideal = textBox('ideal', writing() ? 'Your answer' : 'Ideal answer', writing() ? 12 : 5,
    writing() ? 'Ctrl+Enter submits' : 'what you would have answered');
  const confidence = choice('confidence', 'How sure are you?', Object.entries(words.confidences), form.confidence,
    (value) => { if (change({confidence: value === null ? null : +value})) draw(); });
  const used = form.comment || form.ideal || form.confidence !== null;
  const optional = [confidence, comment.node, ...(writing() ? [] : [ideal.node])];
  const folded = el('details', {class: 'optional', open: !writing() && Boolean(used)},
    el('summary', {}, writing() ? 'Confidence, comment' : 'Confidence, comment, ideal answer'), optional);
  places.notes.replaceChildren(...(writing() ? [ideal.node, folded] : [folded]));
  notes = {comment: comment.area, ideal: ideal.area, confidence, folded};
};
const drawNotes = () => notes.confidence.show(form.confidence);
