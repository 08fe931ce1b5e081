// Around the work: progress, notices, guidelines, last answers, help.

const progress = el('progress', {max: 1, value: 0, 'aria-label': 'Prompts done'});
const counted = el('span', {class: 'counted'});
const looks = button('Markdown', {class: 'quiet', 'aria-pressed': 'false', onclick: () =>
  setAllLooks(look === 'rendered' ? 'exact' : 'rendered')});
const tool = (text, name) => button(text, {class: 'quiet', 'aria-expanded': 'false', onclick: () => openSide(name)});
const openers = {guide: tool('Guidelines', 'guide'), last: tool('My last ten', 'last')};
const helpButton = button('Keys', {class: 'quiet', 'aria-haspopup': 'dialog', onclick: () => help.showModal()});
helpButton.append(el('kbd', {}, '?'));
const leadLink = el('a', {class: 'quiet', href: '/lead/'}, 'Lead page');
const title = el('h1', {class: 'unseen'}, 'Rank responses');
places.tools.replaceChildren(title, el('span', {class: 'name'}, 'prefline'), progress, counted,
  el('span', {class: 'grow'}), looks, openers.guide, openers.last, helpButton);
const drawLead = () => {
  if (task.lead) places.tools.append(leadLink);
  else leadLink.remove();
};
const drawProgress = () => {
  progress.max = Math.max(1, task.done + task.left);
  progress.value = task.done;
  counted.textContent = `${task.done} done` + (task.left ? `, ${task.left} left` : '');
};

// ---- notices -----------------------------------------------------------------------------------

const notice = (kind, role) => {
  const node = el('div', {class: `notice ${kind}`, role, hidden: true});
  places.notices.append(node);
  return (text, ...actions) => {
    node.hidden = !text;
    const key = text + actions.length;
    // told once: what is said again and again is read out again and again
    if (node.said !== key) node.replaceChildren(el('span', {}, text || ''), ...actions);
    node.said = key;
  };
};
places.notices.replaceChildren();
const tellTrouble = notice('bad', 'alert');
const tellEditing = notice('editing', 'status');
const tellGuide = notice('news', 'status');
const drawTrouble = () => {
  if (blocked === 'behind') {
    tellTrouble('This prompt is open in another tab too, with newer changes. What you do here is not saved.',
      button('Show the newer ones', {onclick: takeTheirs}), button('Keep these here', {onclick: keepMine}));
  } else if (blocked === 'gone') {
    tellTrouble('This prompt was finished in another tab. What you changed here since is not saved.',
      button('Next prompt', {onclick: () => { unkeep(task.token); blocked = false; act('look'); }}));
  } else if (trouble) {
    tellTrouble(`${trouble} ${pending ? 'Your answer' : 'What you did'} is kept on this device and sent`
      + ' as soon as it goes. Leave this page open.',
      ...(trouble.includes('logged out') ? [el('a', {href: '/login', target: '_blank', rel: 'noopener'}, 'Log in again')] : []));
  } else tellTrouble('');
};
const drawSaved = () => {
  saved.textContent = !task || !task.token ? '' : blocked || trouble ? 'Not saved'
    : pending ? 'Sending…' : dirty || flight ? 'Saving…' : revision ? 'Saved' : '';
};
let readVersion = 0;
const drawNotices = () => {
  tellEditing(task.editing ? 'You are changing an answer that you gave before. It stands until you submit this one.' : '',
    ...(task.editing ? [button('Leave it as it was', {onclick: () => { unkeep(task.token); act('leave'); }})] : []));
  const {version, state} = task.guidelines;
  const news = task.token && readVersion !== version && (state === 'first' || state === 'changed');
  tellGuide(!news ? '' : state === 'first' ? 'New here? Read the guidelines first.'
    : `The guidelines have changed since your last answer (now version ${version}).`,
    ...(news ? [button('Read them', {onclick: () => openSide('guide', true)}),
      button('Dismiss', {onclick: () => { readVersion = version; drawNotices(); }})] : []));
};

// ---- panels at the side ------------------------------------------------------------------------

const sides = {guide: all('.side.guide')[0], last: all('.side.last')[0]};
const titles = {guide: 'Guidelines', last: 'My last ten'};
const sideTitles = {};
for (const [name, side] of Object.entries(sides)) {
  sideTitles[name] = el('h2', {id: `side-${name}`}, titles[name]);
  side.setAttribute('role', 'complementary');
  side.setAttribute('aria-labelledby', `side-${name}`);
  side.setAttribute('tabindex', '-1');
  inside(side, '.side-head').replaceChildren(sideTitles[name], el('p', {class: 'empty', hidden: true}),
    button('Close', {class: 'quiet', onclick: () => openSide(name, false)}));
}
const isOpen = (name) => sides[name].classList.contains('open');
let openedWithKeys = false;
const openSide = (name, open = !isOpen(name)) => {
  for (const other of Object.keys(sides)) {
    const now = other === name && open;
    sides[other].classList.toggle('open', now);
    openers[other].setAttribute('aria-expanded', String(now));
  }
  app.classList.toggle('beside', open);
  if (!open) {
    // who came with keys goes back to the button; after a click, Enter must not open it once more
    if (openedWithKeys) openers[name].focus();
    else document.activeElement.blur();
    return;
  }
  openedWithKeys = !clicked;
  if (name === 'guide') { readVersion = task.guidelines.version; drawNotices(); }
  else askRecent();
  sides[name].focus({preventScroll: true});
};
const drawGuide = () => {
  const {version} = task.guidelines;
  openers.guide.hidden = !version;
  sideTitles.guide.textContent = `Guidelines, version ${version}`;
};

// ---- my last answers ---------------------------------------------------------------------------

const answers = all('.side.last .answer');
const againPlaces = answers.map(row => inside(row, '.again'));
const states = {ranked: '', late: 'came late', unrankable: 'all bad'};
const askRecent = () => {
  props.value = {token: '', ask: uuid()};
  trigger('recent', {});
};
document.addEventListener('prefline-recent', ({detail}) => {
  if (!detail) return;
  sides.last.querySelector('.empty').textContent = 'There is none that you may still change.';
  sides.last.querySelector('.empty').hidden = detail.rows.length > 0;
  answers.forEach((row, i) => {
    const given = detail.rows[i];
    row.classList.toggle('shown', Boolean(given));
    if (!given) return;
    const at = new Date(given.created * 1000);
    const when = at.toDateString() === new Date().toDateString()
      ? at.toLocaleTimeString([], {hour: '2-digit', minute: '2-digit'}) : at.toLocaleString();
    againPlaces[i].replaceChildren(
      el('span', {class: 'when'}, [when, states[given.state]].filter(Boolean).join(' · ')),
      button('Change', {class: 'quiet', 'aria-label': `Change answer ${i + 1}, of ${when}`, onclick: () => {
        openSide('last', false);
        if (task.token !== given.token) act('reopen', {target: given.token});
      }}));
  });
}, {signal});

// ---- help --------------------------------------------------------------------------------------

const KEYS = [
  ['1 – 9', 'rank the selected response; the next one is then selected'],
  ['A – I', 'select a response'],
  ['0  or  Backspace', 'take it back'],
  ['Ctrl + Z', 'undo'],
  ['Enter', 'submit'],
  ['X', 'all bad'],
  ['S', 'skip, with a reason'],
  ['O', 'score and flags of the selected response'],
  ['N', 'write a comment'],
  ['M', 'Markdown or exact text'],
  ['Ctrl + Enter', 'submit from a text field; Esc leaves the field'],
  ['?', 'this help'],
];
const help = el('dialog', {class: 'help', 'aria-labelledby': 'help-title'},
  el('h2', {id: 'help-title'}, 'How to rank'),
  el('p', {}, 'Read the prompt, then all responses. Put the best response on rank 1. Responses that are equally'
    + ' good share a rank. Judge what is written, not how long it is.'),
  el('table', {}, el('tbody', {}, KEYS.map(([key, text]) =>
    el('tr', {}, el('th', {scope: 'row'}, key), el('td', {}, text))))),
  el('p', {}, 'Mouse or finger: drag a letter to a rank, or select a response and press the rank. What you do is'
    + ' saved as you go; you can reload at any time.'),
  button('Close', {class: 'submit', onclick: () => help.close()}));
