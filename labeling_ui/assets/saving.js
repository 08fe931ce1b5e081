// What is written goes to the server as a draft. Until it is there, it is kept in this browser, so
// that neither a lost connection nor a reload takes it.

const KEPT = 'prefline-kept:';
const WEEK = 7 * 86400e3;
const WAIT = 8000;     // for an answer
const RETRY = 3000;
let revision = 0;      // of the newest draft that was sent
let dirty = false;     // there is something that the server has not acknowledged
let flight = null;     // the request under way: {kind, timer, ...}
let draftTimer = null, retryTimer = null;
let pending = null;    // what to do, until it is answered: {do, submission, ...}
let blocked = false;   // another tab has newer; the person decides
let trouble = '';      // why nothing gets through
const sending = () => pending !== null;

const uuid = () => {
  // crypto.randomUUID is only there on https and localhost
  if (crypto.randomUUID) return crypto.randomUUID();
  return [...crypto.getRandomValues(new Uint8Array(16))].map(x => x.toString(16).padStart(2, '0')).join('');
};

// ---- in this browser ---------------------------------------------------------------------------

const stored = {
  get: (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, JSON.stringify(value)); } catch { /* full */ } },
  drop: (key) => { try { localStorage.removeItem(key); } catch { /* not allowed */ } },
  keys: () => { try { return Object.keys(localStorage); } catch { return []; } },
};
const keep = () => {
  const {who, token} = task;
  stored.set(KEPT + token, {who, token, revision: revision + 1, form, pending, active, at: Date.now()});
};
const unkeep = (token) => stored.drop(KEPT + token);
// what a reload or a lost connection left behind of other tasks
const leftBehind = () => {
  for (const key of stored.keys().filter(name => name.startsWith(KEPT))) {
    const kept = stored.get(key);
    if (!kept || Date.now() - kept.at > WEEK) stored.drop(key);
    else if (kept.who === task.who && kept.token !== task.token) {
      stored.drop(key);
      if (kept.pending && kept.pending.do === 'submit') return kept;
    }
  }
  return null;
};

// ---- to the server -----------------------------------------------------------------------------

const send = (kind, more) => {
  clearTimeout(draftTimer);
  clearTimeout(retryTimer);
  const ask = uuid();
  props.value = {
    token: task ? task.token : '', revision, ...form, active: Math.round(active),
    guidelines: task ? task.guidelines.version : null, ...more, ask,
  };
  flight = {kind, ask, revision, timer: setTimeout(() => failed('The server does not answer.'), WAIT)};
  trigger(kind === 'act' ? 'act' : 'draft', {});
  drawSaved();
};
const landed = () => {
  if (flight) clearTimeout(flight.timer);
  flight = null;
  trouble = '';
  drawTrouble();
};
const failed = (why) => {
  if (flight) clearTimeout(flight.timer);
  if (flight && flight.kind === 'draft') dirty = true;
  flight = null;
  trouble = why;
  drawTrouble();
  drawSaved();
  clearTimeout(retryTimer);
  retryTimer = setTimeout(again, RETRY);
};
const again = () => {
  if (flight) return;
  if (pending) send('act', pending);
  else if (dirty) saveNow();
};
const saveSoon = (wait) => {
  dirty = true;
  keep();
  drawSaved();
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveNow, wait);
};
const saveNow = () => {
  // one at a time: the answer to this one sends the next
  if (!task || !dirty || flight || pending || blocked) return;
  dirty = false;
  revision += 1;
  send('draft', {});
};
const act = (what, more = {}) => {
  if (pending) return;
  pending = {do: what, ...more};
  if (task.token && what === 'submit') keep();
  // a draft under way is overtaken; the form goes along with what is asked
  if (flight) clearTimeout(flight.timer);
  revision += 1;
  send('act', pending);
  draw();
};

document.addEventListener('prefline-draft', ({detail}) => {
  if (!detail || !flight || flight.kind !== 'draft' || detail.revision !== flight.revision) return;
  landed();
  if (detail.token !== task.token) return;
  if (detail.outcome === 'saved') {
    if (dirty) saveNow();
    else unkeep(task.token);
  } else if (detail.outcome === 'refused') {
    say(detail.said);
    dirty = true;
    trouble = detail.said;
    drawTrouble();
  } else {
    dirty = true;
    blocked = detail.outcome;
    newest = detail.newest;
    drawTrouble();
  }
  drawSaved();
}, {signal});
let newest = 0;
const keepMine = () => {
  blocked = false;
  revision = Math.max(revision, newest);
  drawTrouble();
  saveNow();
};
const takeTheirs = () => { unkeep(task.token); location.reload(); };

document.addEventListener('prefline-request', ({detail: {path, status}}) => {
  if (!flight || !path.includes('/gradio_api/') || (status >= 200 && status < 300)) return;
  failed(status === 0 ? 'The server cannot be reached.'
    : status === 401 || status === 403 ? 'You are logged out.'
    : status === 413 ? 'What you wrote is too long to be sent.'
    : 'The server has a fault.');
}, {signal});

// ---- the time that was worked ------------------------------------------------------------------

const IDLE = 30e3;
let active = 0;        // seconds on this task
let touched = Date.now(), ticked = Date.now();
for (const kind of ['pointerdown', 'pointermove', 'keydown', 'wheel', 'touchstart', 'scroll']) {
  document.addEventListener(kind, (event) => {
    touched = Date.now();
    if (kind === 'pointerdown') clicked = true;
    if (kind === 'keydown') clicked = false;
  }, {signal, capture: true, passive: true});
}
const ACTIVE = 'prefline-active';
const ticking = setInterval(() => {
  const passed = Math.min(2, (Date.now() - ticked) / 1000);
  ticked = Date.now();
  if (!task || !task.token || document.hidden || !document.hasFocus() || ticked - touched > IDLE) return;
  active += passed;
  try { sessionStorage.setItem(ACTIVE, JSON.stringify([task.token, active])); } catch { /* not allowed */ }
}, 1000);
signal.addEventListener('abort', () => clearInterval(ticking));
const activeBefore = (token) => {
  try {
    const [of, seconds] = JSON.parse(sessionStorage.getItem(ACTIVE));
    return of === token ? seconds : 0;
  } catch { return 0; }
};
