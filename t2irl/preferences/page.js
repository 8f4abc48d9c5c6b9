// The annotation page. A vote is written down here before the next pair is shown, and sent until the server has acknowledged
// it; its key makes sending it twice harmless. So a reload, a closed lid or a server that is started again loses nothing.
"use strict";

const AHEAD = 5; // questions whose pictures are loaded beforehand
const $ = (id) => document.getElementById(id);
const state = { rater: null, study: "", current: null, queue: [], outbox: [], history: [], done: 0, total: 0, shownAt: 0, ready: false,
  sending: null, filling: null, pause: 0, images: new Map() };

async function post(path, body) {
  const answer = await fetch(`api/${path}`, { method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ rater: state.rater, ...body }) });
  if (answer.ok) return answer.json();
  const detail = await answer.json().then((content) => content.detail, () => "");
  throw Object.assign(new Error(typeof detail === "string" ? detail : "the request was refused"), { status: answer.status });
}

const hasAnswered = (error) => error.status !== undefined && error.status < 500; // rather than: cannot be reached
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

async function insist(path, body) { // until the server answers
  for (;;) {
    try {
      const answer = await post(path, body);
      state.pause = 0;
      tell();
      return answer;
    } catch (error) {
      if (hasAnswered(error)) throw error;
      state.pause = Math.min(state.pause ? state.pause * 2 : 250, 4000);
      tell();
      await sleep(state.pause);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- outbox
const shelf = () => `t2irl-outbox-${state.study}-${state.rater}`;
const keep = () => localStorage.setItem(shelf(), JSON.stringify(state.outbox));

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function send() { // one at a time, in order
  state.sending ??= (async () => {
    while (state.outbox.length) {
      const vote = state.outbox[0];
      try {
        await insist("vote", vote);
      } catch (error) {
        if (error.status !== 409 && error.status !== 404) throw error; // 409: answered in another window. 404: another study
      }
      state.outbox = state.outbox.filter((other) => other.key !== vote.key);
      keep();
      tell();
    }
  })().catch(fail).finally(() => { state.sending = null; });
  return state.sending;
}

// -------------------------------------------------------------------------------------------------------------- queue
function load(name) { // a picture, decoded and ready to be shown
  if (!state.images.has(name)) {
    const image = new Image();
    image.src = `image/${name}`;
    state.images.set(name, image.decode().then(() => image));
    state.images.get(name).catch(() => state.images.delete(name));
    while (state.images.size > 40) state.images.delete(state.images.keys().next().value);
  }
  return state.images.get(name);
}

function here() { // ids of what is shown, comes next, or is answered but not stored yet
  return new Set([...[state.current, ...state.queue].filter(Boolean).map((item) => item.id), ...state.outbox.map((vote) => vote.item)]);
}

function fill() { // keep some questions ahead
  state.filling ??= (async () => {
    const answer = await insist("next", { skip: [...here()], count: AHEAD });
    // What was answered or taken back while this was on its way is not asked twice.
    const known = new Set([...here(), ...state.history.map((item) => item.id)]);
    const fresh = answer.items.filter((item) => !known.has(item.id));
    for (const item of fresh) for (const name of [item.left, item.right]) load(name).catch(() => {});
    state.queue.push(...fresh);
    state.total = Math.max(answer.total, state.done);
    count();
    return fresh.length;
  })().finally(() => { state.filling = null; });
  return state.filling;
}

async function advance() {
  state.current = null;
  state.ready = false;
  if (!state.queue.length) {
    $("judge").classList.add("wait");
    await send(); // what is waiting may be all that is open
    await fill();
  }
  const next = state.queue.shift();
  if (!next) return finish();
  await show(next);
  if (state.queue.length < AHEAD - 1) fill().catch(fail);
}

async function show(item) {
  state.current = item;
  state.ready = false;
  section("judge");
  $("judge").classList.add("wait");
  $("question").textContent = item.question;
  $("prompt").textContent = item.prompt; // as text: whatever it holds is shown, nothing of it is run
  $("prompt").scrollTop = 0;
  for (;;) {
    try {
      await Promise.all(["left", "right"].map((side) => load(item[side]).then((image) => put($(side), image))));
      break;
    } catch {
      state.pause = 500;
      tell();
      await sleep(500);
    }
  }
  if (state.current !== item) return;
  state.pause = 0;
  tell();
  requestAnimationFrame(() => {
    $("judge").classList.remove("wait");
    state.shownAt = performance.now();
    state.ready = true;
    document.body.dataset.item = item.id;
  });
}

async function put(element, image) {
  element.src = image.src;
  element.classList.toggle("small", image.naturalWidth < 200);
  await element.decode();
}

// ------------------------------------------------------------------------------------------------------------ answers
function answer(choice) {
  if (!state.ready || !state.current) return;
  const item = state.current;
  state.ready = false;
  state.outbox.push({ key: newKey(), item: item.id, answer: choice, ms: Math.round(performance.now() - state.shownAt) });
  keep();
  state.history.push(item);
  state.done += 1;
  count();
  send();
  advance().catch(fail);
}

async function undo() {
  const item = state.history[state.history.length - 1];
  if (!item || state.undoing || (state.current && !state.ready)) return;
  state.undoing = true;
  try {
    await send();
    const before = state.current;
    const found = await insist("undo", { item: item.id });
    state.history.pop();
    if (found.undone) state.done -= 1;
    if (before) state.queue.unshift(before);
    count();
    await show(found.item);
  } catch (error) {
    fail(error);
  } finally {
    state.undoing = false;
  }
}

// ------------------------------------------------------------------------------------------------------------ display
function section(name) {
  for (const id of ["welcome", "judge", "done", "problem"]) $(id).hidden = id !== name;
  $("undo").hidden = !(name === "judge" || name === "done") || !state.history.length;
  $("leave").hidden = !state.rater || name === "welcome";
  document.body.dataset.section = name;
}

function count() {
  $("count").textContent = state.total ? `${state.done} of ${state.total}` : "";
  const share = state.total ? Math.round((100 * state.done) / state.total) : 0;
  $("filled").style.width = `${share}%`;
  document.querySelector(".bar").setAttribute("aria-valuenow", share);
  $("undo").hidden = !state.history.length || $("welcome").hidden === false;
}

function tell() {
  const waiting = state.outbox.length;
  $("net").textContent = state.pause
    ? `The server cannot be reached, trying again.${waiting ? ` ${waiting} answer${waiting > 1 ? "s are" : " is"} kept here.` : ""}` : "";
  document.body.dataset.waiting = waiting;
}

function finish() {
  $("thanks").textContent = `Thank you. ${state.done} answers are stored; you can close this page.`;
  section("done");
}

function fail(error) {
  $("why").textContent = `${error.message}. Answers that are not stored yet are kept in this browser; reload the page to try again.`;
  section("problem");
}

async function enter(name) {
  state.rater = name;
  let found = await insist("hello", {});
  localStorage.setItem("t2irl-rater", name);
  state.study = found.study;
  state.outbox = JSON.parse(localStorage.getItem(shelf()) ?? "[]");
  $("leave").textContent = `${name}: leave`;
  if (state.outbox.length) { // what an earlier visit could not send any more
    await send();
    found = await insist("hello", {});
  }
  Object.assign(state, { done: found.done, total: found.total, history: found.last ? [found.last] : [] });
  count();
  await advance();
}

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad" };

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !$("welcome").hidden) return;
  // A long text is scrolled with the same keys while it has the focus.
  const scrolls = document.activeElement === $("prompt") && $("prompt").scrollHeight > $("prompt").clientHeight;
  if (KEYS[event.key] && !(scrolls && /Up|Down/.test(event.key)) && !$("judge").hidden) {
    event.preventDefault();
    answer(KEYS[event.key]);
  } else if (event.key.toLowerCase() === "z" || event.key === "Backspace") {
    event.preventDefault();
    undo();
  }
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => { button.blur(); answer(button.dataset.answer); });
}
$("undo").addEventListener("click", undo);
$("leave").addEventListener("click", () => { localStorage.removeItem("t2irl-rater"); location.reload(); });
$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (name) enter(name).catch(fail);
});

const known = localStorage.getItem("t2irl-rater");
if (known) enter(known).catch(fail);
else {
  section("welcome");
  $("name").focus();
}
