// One job, live: its events as a stream while somebody looks. Progress is shown as it comes; when the state, the phase or
// the warnings change, the part of the page that tells of them is asked for anew.

import { ask, notify } from "./page.js";
import { TensorMap } from "./tensor_map.js";
import { tellTimes } from "./times.js";
import { bytes, seconds } from "./words.js";

const FIRST_WAIT = 1000;
const MOST_WAIT = 30_000;
const TAIL = 65_536;
const job = document.getElementById("job");
const api = job.dataset.api;
const title = document.title;
const element = (id) => document.getElementById(id);
const state = () => element("state");

// Progress.

function put(id, text) {
  const place = element(id);
  if (place && place.textContent !== text) place.textContent = text;
}

function showProgress(progress) {
  document.dispatchEvent(new CustomEvent("job-progress", { detail: progress }));
  const share = progress.fraction ?? 0;
  const percent = `${Math.floor(100 * share)} %`;
  const isAtWork = progress.status === "running" || progress.status === "canceling";
  if (isAtWork || progress.status !== "succeeded") showMap(progress);
  else element("map-card").hidden = true;
  document.title = isAtWork ? `${percent} · ${title}` : title;
  if (!isAtWork || !element("bar")) return;
  element("bar").value = share;
  const of = (done, total) => (total ? `${bytes(done)} of ${bytes(total)}` : "–");
  put("share", percent);
  if (progress.phase) put("phase", progress.phase);
  put("left", progress.seconds_left == null ? "–" : seconds(progress.seconds_left));
  put("rate", progress.bytes_per_second ? `${bytes(progress.bytes_per_second)}/s` : "–");
  put("tensors", progress.tensors_total ? `${progress.tensors_done} of ${progress.tensors_total}` : "–");
  put("read", of(progress.bytes_read, progress.bytes_read_total));
  put("written", of(progress.bytes_written, progress.bytes_written_total));
  put("tensor", progress.tensor || "–");
  const count = (done, total) => (total ? `${done} of ${total}` : "–");
  put("tried", count(progress.trials_done, progress.trials_total));
  put("steps", count(progress.steps_done, progress.steps_total));
  // What a search or a calibration reads and writes is told by the trial or the step, if at all.
  const isCounted = Boolean(progress.trials_total || progress.steps_total);
  const isShown = { tried: progress.trials_total, steps: progress.steps_total };
  for (const id of ["tried", "steps", "rate", "tensors", "read", "written"]) {
    element(id).parentElement.hidden = !(id in isShown ? isShown[id] : !isCounted);
  }
}

// Which tensors are done: their names are asked for once, when a worker knows them.

let map;
let asking = false;

async function showMap(progress) {
  const runs = progress.tensors_finished;
  if (!runs) return;
  if (!map && !asking) {
    asking = true;
    try {
      const { names } = await ask(`${api}/tensors`);
      if (names.length) map = new TensorMap(element("map"), names);
    } catch {
      // Without the names there is no map; the next progress asks again.
    }
    asking = false;
  }
  if (!map) return;
  const done = map.show(runs, progress.status === "running" ? progress.tensor : "");
  put("map-count", `${done} of ${map.names.length} done`);
  element("map-how").hidden = !map.isGrid;
  element("map-card").hidden = false;
}

function showElapsed() {
  const started = Number(state().dataset.started);
  if (started) put("elapsed", seconds(Date.now() / 1000 - started));
}

function showState() {
  const { state: status, phase, progress } = state().dataset;
  showProgress({ status, phase, ...JSON.parse(progress) });
  showElapsed();
  tellTimes(state());
  document.dispatchEvent(new CustomEvent("job-changed"));
}

let asked = 0;
/** Gives up all that is asked of a job, as it is being deleted. */
let leaving = new AbortController();

/** Ask for what changes of the page, and put it in place, unless it was asked for again meanwhile. */
async function refresh() {
  const mine = ++asked;
  const { signal } = leaving;
  const answer = await fetch(location.pathname, { headers: { "HX-Request": "true" }, signal });
  if (answer.redirected) return location.reload(); // to where one signs in
  if (answer.status === 404) return location.assign("/jobs"); // somebody deleted it
  if (!answer.ok) throw new Error(answer.statusText);
  const text = await answer.text();
  if (mine !== asked) return;
  const before = state().dataset.state;
  await htmx.swap({ text, target: state(), sourceElement: state(), swap: "outerMorph" });
  showState();
  const { state: status, phase } = state().dataset;
  if (status !== before || phase) say(status === "running" ? phase || status : status);
}

let said = "";
/** For those who listen: what the job is at, each once. */
function say(what) {
  if (what !== said) element("said").textContent = said = what;
}

let refreshing;
/** Refresh soon, once for many reasons. */
function refreshSoon() {
  refreshing ??= setTimeout(async () => {
    refreshing = undefined;
    try {
      await refresh();
      listen(); // who asked for a job that had ended to be retried may have hung up since
    } catch {
      lose();
    }
  }, 50);
}

// The stream.

let stream;
let last = 0;
let wait = FIRST_WAIT;
let retrying;

function listen() {
  if (stream || document.hidden || !state().hasAttribute("data-active")) return;
  stream = new EventSource(`${api}/events?after=${last}`);
  stream.addEventListener("open", () => {
    wait = FIRST_WAIT;
    if (!element("lost").hidden) refreshSoon();
    element("lost").hidden = true;
  });
  stream.addEventListener("progress", (event) => showProgress(JSON.parse(event.data)));
  for (const name of ["state", "phase", "warning", "log"]) {
    stream.addEventListener(name, (event) => {
      last = Number(event.lastEventId) || last;
      if (last > Number(job.dataset.events) && name !== "log") refreshSoon();
      readLogSoon();
    });
  }
  stream.addEventListener("done", () => {
    hangUp();
    refreshSoon();
    readLogSoon();
  });
  // A connection that broke, the browser opens again; one that was refused, nobody does but us.
  stream.addEventListener("error", () => (stream?.readyState === EventSource.CLOSED ? lose() : (element("lost").hidden = false)));
}

function hangUp() {
  stream?.close();
  stream = undefined;
}

/** There is no connection now: look again after ever longer times. */
function lose() {
  hangUp();
  clearTimeout(retrying);
  if (leaving.signal.aborted) return;
  element("lost").hidden = false;
  if (document.hidden) return;
  retrying = setTimeout(async () => {
    try {
      await refresh();
      element("lost").hidden = true;
      wait = FIRST_WAIT;
      listen();
      readLogSoon();
    } catch {
      wait = Math.min(2 * wait, MOST_WAIT);
      lose();
    }
  }, wait);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hangUp();
    clearTimeout(retrying);
  } else if (!element("lost").hidden) {
    lose();
  } else if (state().hasAttribute("data-active")) {
    refreshSoon();
    listen();
  }
});
setInterval(() => document.hidden || showElapsed(), 1000);

// The log: its tail, then what is new of it, by ranges. One byte that is here already is asked for again, because a range
// of nothing would be refused.

const log = element("log");
let read = 0;
let reading = false;
let readAgain = false;
let isPaused = false;

async function readLog() {
  const range = read ? `bytes=${read - 1}-` : `bytes=-${TAIL}`;
  // The browser would answer with the part that it keeps of an earlier answer.
  const { signal } = leaving;
  const answer = await fetch(`${api}/logs`, { headers: { Range: range }, cache: "no-store", signal });
  if (!answer.ok) throw new Error(answer.statusText);
  const [, begin, end] = /bytes (\d+)-(\d+)/.exec(answer.headers.get("content-range") ?? "") ?? [];
  const data = new Uint8Array(await answer.arrayBuffer());
  const isTail = !read && Number(begin) > 0;
  let text = new TextDecoder().decode(read ? data.subarray(1) : data);
  read = end === undefined ? data.length : Number(end) + 1;
  if (isTail) text = `…\n${text.slice(text.indexOf("\n") + 1)}`;
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.append(text);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

async function readLogSoon() {
  readAgain = true;
  if (reading || isPaused) return;
  reading = true;
  try {
    while (readAgain && !isPaused && !leaving.signal.aborted) {
      readAgain = false;
      await readLog();
      await new Promise((done) => setTimeout(done, 300));
    }
  } catch {
    // Whoever holds the stream tells that nothing answers, and asks again.
  }
  reading = false;
}

element("log-pause").addEventListener("click", (event) => {
  isPaused = !isPaused;
  event.target.setAttribute("aria-pressed", String(isPaused));
  event.target.textContent = isPaused ? "Go on" : "Pause";
  if (!isPaused) readLogSoon();
});

// What one can do.

const doing = {
  cancel: () => ask(`${api}/cancel`, { method: "POST" }),
  retry: () => ask(`${api}/retry`, { method: "POST" }),
  async verify() {
    const body = JSON.stringify({ job: api.split("/").pop() });
    const made = await ask("/v1/verify", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    location.assign(`/jobs/${made.id}`);
  },
  async delete() {
    element("delete-dialog").returnValue = "keep";
    element("delete-dialog").showModal();
  },
};

job.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-do]");
  if (!button) return;
  button.disabled = true;
  try {
    await doing[button.dataset.do]();
    if (button.dataset.do === "cancel" || button.dataset.do === "retry") {
      await refresh();
      listen();
      readLogSoon();
    }
  } catch (error) {
    notify(error.message, "bad");
  }
  button.disabled = false;
});

element("delete-dialog").addEventListener("close", async (event) => {
  if (event.target.returnValue !== "delete") return;
  leaving.abort();
  hangUp();
  try {
    await ask(api, { method: "DELETE" });
    location.assign("/jobs");
  } catch (error) {
    notify(error.message, "bad");
    leaving = new AbortController();
    refreshSoon();
    readLogSoon();
  }
});

last = Number(job.dataset.events);
showState();
listen();
readLogSoon();
