// New merge: a form and a text that are one recipe, and what that would do.

import { ask, notify } from "./page.js";
import { Editor } from "./editor.js";
import { examples, family } from "./examples.js";
import { drawFields } from "./recipe_form.js";
import { Recipe, textOf, valueOf } from "./recipe.js";

const PATIENCE = 450; // milliseconds without a change before the service is asked
const MAX_CARD = 2 * 2 ** 20;
const find = (id) => document.getElementById(id);
const root = find("merging");
const draftName = `draft:${root.dataset.owner}`;
const editor = new Editor(find("editor"));
const YAML_BODY = { "Content-Type": "application/yaml" };

const state = { recipe: new Recipe(""), methods: [], models: [], index: 0, problems: [], aside: new Map() };

function sized(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let i = 0;
  for (; bytes >= 999.5 && i < units.length - 1; i++) bytes /= 1000;
  return `${i ? bytes.toPrecision(3) : bytes} ${units[i]}`;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/* The text, and what follows from it. */

/** Take a text for the recipe. `from`: what changed it, which is not drawn again. */
function take(text, from) {
  state.recipe = new Recipe(text);
  if (from === "outside" || state.index >= state.recipe.documents.length) state.index = Math.max(0, state.recipe.output);
  if (from !== "text") editor.text = text;
  if (from !== "form") drawForm();
  keepDraft();
  showExamples();
  plan.soon();
}

/** Change the recipe's text from the form. `isDrawn`: whether the form has to be drawn again for it. */
function change(make, isDrawn = false) {
  try {
    if (editor.text !== state.recipe.text) state.recipe = new Recipe(editor.text);
    take(make(state.recipe), isDrawn ? "draw" : "form");
  } catch (error) {
    console.info(error);
    notify("The form cannot change this as it is written; change it in the text.", "bad");
    drawForm();
  }
}

function keepDraft() {
  try {
    if (editor.text.trim()) localStorage.setItem(draftName, JSON.stringify({ text: editor.text }));
    else localStorage.removeItem(draftName);
  } catch {
    // No room, or not allowed: then there is no draft.
  }
}

function readDraft() {
  try {
    return String(JSON.parse(localStorage.getItem(draftName) ?? "{}").text ?? "");
  } catch {
    return "";
  }
}

/** Put a whole other recipe in place of the one there is, which can be had back. */
function replace(text) {
  const before = editor.text;
  take(text, "outside");
  if (!before.trim() || before === text) return;
  const back = element("button", { type: "button", className: "quiet", textContent: "Bring mine back" });
  const notice = element("div", { className: "notice" }, "Your recipe was replaced. ", back);
  back.addEventListener("click", () => {
    take(before, "outside");
    notice.remove();
  });
  find("notices").append(notice);
  setTimeout(() => notice.remove(), 15000);
}

/* The form. */

function methodsNamed(name) {
  return state.methods.filter((each) => each.name === name);
}

/** The method that the shown document means; undefined where it names none that there is. */
function methodOf(recipe, index = state.index) {
  const meanings = methodsNamed(recipe.get(index, ["merge_method"]));
  const semantics = recipe.get(index, ["semantics"]) ?? "mergekit";
  return meanings.find((each) => each.semantics === semantics) ?? meanings[0];
}

function drawForm() {
  const { recipe } = state;
  const waits = find("form-waits");
  const canShow = recipe.isReadable && state.methods.length > 0;
  waits.hidden = canShow || recipe.isEmpty;
  if (!waits.hidden) waits.textContent = "The text cannot be read as YAML now; the form waits until it can.";
  find("fields").hidden = !canShow;
  find("method").disabled = !canShow && !recipe.isEmpty;
  drawStages(canShow);
  const select = find("method");
  select.querySelector("[data-unknown]")?.remove();
  const name = canShow ? String(recipe.get(state.index, ["merge_method"]) ?? "") : "";
  if (!state.methods.some((each) => each.name === name)) {
    const label = recipe.isEmpty || !name ? "Choose a method…" : `${name} (there is no such method)`;
    select.prepend(element("option", { value: name, textContent: label }));
    select.firstElementChild.dataset.unknown = "";
  }
  select.value = name;
  const method = canShow ? methodOf(recipe) : undefined;
  const about = find("about-method");
  about.replaceChildren();
  if (method) {
    const link = element("a", { href: `/methods#${method.name}-${method.semantics}`, textContent: "More about it" });
    about.append(method.summary, " ", link);
  }
  if (canShow) {
    drawFields(find("fields"), {
      ...{ recipe, index: state.index, method, meanings: methodsNamed(name), models: state.models },
      ...{ change, setMethod, goTo: (pointer) => editor.goTo(state.recipe.place(pointer)) },
    });
  }
  showProblems();
}

function drawStages(canShow) {
  const place = find("stages");
  const count = state.recipe.documents.length;
  place.hidden = !canShow || count < 2;
  place.replaceChildren();
  if (place.hidden) return;
  const select = element("select", { id: "document" });
  state.recipe.documents.forEach((each, i) => {
    const isOutput = i === state.recipe.output;
    const name = each.get("name");
    select.append(element("option", { value: i, textContent: `${i + 1}: ${name ?? "the output"}${isOutput && name ? " (the output)" : ""}` }));
  });
  select.value = state.index;
  select.addEventListener("change", () => {
    state.index = Number(select.value);
    drawForm();
    find("document").focus();
  });
  place.append(element("label", { htmlFor: "document", textContent: "This recipe has several documents; the form shows" }), select);
}

/** The recipe's text with another method: parameters that it does not have are laid aside, and come back with theirs;
 * those that it asks for begin with something usual.
 */
function setMethod(name, semantics) {
  const meanings = methodsNamed(name);
  const method = meanings.find((each) => each.semantics === semantics) ?? meanings[0];
  if (state.recipe.isEmpty) {
    const ready = freshRecipe(method);
    take(textOf(ready), "outside");
    return;
  }
  const index = state.index;
  change((recipe) => {
    const before = methodOf(recipe, index);
    const step = (path, value) => (recipe = new Recipe(recipe.with(index, path, value)));
    step(["merge_method"], name);
    const written = meanings.length > 1 && method !== meanings[0] ? method.semantics : undefined;
    if (written !== recipe.get(index, ["semantics"])) step(["semantics"], written);
    const scope = recipe.get(index, ["scope"]);
    if (scope !== undefined && !method.scopes.includes(scope)) step(["scope"], undefined);
    const count = recipe.get(index, ["models"])?.length ?? 0;
    const holders = [[], ...Array.from({ length: count }, (_, i) => ["models", i])];
    for (const holder of holders) {
      const given = recipe.get(index, [...holder, "parameters"]) ?? {};
      for (const parameter of Object.keys(given)) {
        const isKnown = holder.length ? method.per_model.includes(parameter) : parameter in method.parameters.properties;
        const wasKnown = before && parameter in before.parameters.properties;
        if (isKnown || !wasKnown) continue;
        state.aside.set(JSON.stringify([index, holder, parameter]), given[parameter]);
        step([...holder, "parameters", parameter], undefined);
      }
      for (const parameter of Object.keys(method.parameters.properties)) {
        const key = JSON.stringify([index, holder, parameter]);
        if (!state.aside.has(key) || parameter in given || (holder.length && !method.per_model.includes(parameter))) continue;
        step([...holder, "parameters", parameter], state.aside.get(key));
        state.aside.delete(key);
      }
    }
    for (const parameter of method.parameters.required ?? []) {
      const everywhere = recipe.get(index, ["parameters", parameter]) !== undefined;
      const beside = holders.slice(1).some((holder) => recipe.get(index, [...holder, "parameters", parameter]) !== undefined);
      if (!everywhere && !beside) step(["parameters", parameter], usual(method, parameter, count));
    }
    return recipe.text;
  }, true);
}

/** What a parameter without a default begins with. */
function usual(method, parameter, count) {
  const [example] = method.parameters.properties[parameter].examples ?? [];
  if (example !== undefined) return example;
  if (parameter === "weight") return valueOf(String(Math.round(100 / Math.max(1, count)) / 100));
  return 0.5;
}

/** A recipe for a method, of the models there are. */
function freshRecipe(method) {
  const [base, ...tuned] = family(state.models);
  const { min, max } = method.models;
  const others = method.base === "model" ? [base ?? "", ...tuned] : tuned;
  const count = Math.min(Math.max(min, Math.min(others.length, 3)), max ?? 64);
  const names = Array.from({ length: Math.max(1, count) }, (_, i) => others[i] ?? "");
  const required = (method.parameters.required ?? []).map((each) => [each, usualNumber(usual(method, each, names.length))]);
  return {
    merge_method: method.name,
    ...(method.semantics === "mergekit" ? {} : { semantics: method.semantics }),
    ...(method.base === "required" ? { base_model: base ?? "" } : {}),
    models: names.map((model) => ({ model, ...(method.own_bases ? { base_model: base ?? "" } : {}) })),
    ...(required.length ? { parameters: Object.fromEntries(required) } : {}),
  };
}

const usualNumber = (value) => (value?.text === undefined ? value : Number(value.text));

/* Examples, and where there are no models. */

function showExamples() {
  const ready = examples(state.models);
  find("start").hidden = ready.length === 0;
  find("no-models").hidden = !state.hasLooked || state.models.length > 0;
  if (state.shown === state.models) return;
  state.shown = state.models;
  find("start").querySelector("ul").replaceChildren(
    ...ready.map(({ title, text }) => {
      const button = element("button", { type: "button", textContent: title });
      button.addEventListener("click", () => replace(text));
      return element("li", {}, button);
    }),
  );
}

async function lookForModels() {
  const found = [];
  let after = "";
  for (let pages = 0; pages < 10; pages++) {
    const page = await ask(`/v1/models?after=${encodeURIComponent(after)}`);
    found.push(...page.data);
    if (!page.has_more) break;
    after = page.next;
  }
  state.models = found;
  state.hasLooked = true;
}

/* The plan. */

const plan = {
  timer: 0,
  asked: null,
  running: null,

  /** Ask for it once nothing has changed for a while. */
  soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.now(), PATIENCE);
  },

  async now() {
    const text = editor.text;
    if (text === this.asked) return;
    this.asked = text;
    this.running?.abort();
    this.running = null;
    if (!text.trim()) {
      tell("Nothing yet: choose an example, or write a recipe.", "");
      return;
    }
    const size = new Blob([text]).size;
    if (size > Number(root.dataset.limit)) {
      tell(`This has ${sized(size)}; at most ${sized(Number(root.dataset.limit))} are read.`, "bad");
      return;
    }
    const running = (this.running = new AbortController());
    let found, failed;
    try {
      found = await ask("/v1/recipes:validate", { method: "POST", headers: YAML_BODY, body: text, signal: running.signal });
    } catch (error) {
      failed = error;
    }
    // What was asked meanwhile is answered later, and that counts.
    if (this.running !== running || running.signal.aborted) return;
    this.running = null;
    if (failed) refuse(failed);
    else accept(found);
  },

  /** Forget what was asked, so that it is asked again. */
  again() {
    this.asked = null;
    return this.now();
  },
};

function tell(words, kind, problems = [], told = null) {
  const verdict = find("verdict");
  if (verdict.textContent !== words) verdict.textContent = words;
  verdict.className = `notice ${kind}`;
  state.problems = problems;
  find("plan").hidden = told === null;
  find("plan").replaceChildren(...(told ? drawPlan(told) : []));
  showProblems();
}

function accept({ plan: told, resolved }) {
  const warnings = told.warnings.length;
  const also = warnings ? `, with ${warnings} ${warnings === 1 ? "warning" : "warnings"}` : "";
  tell(`This recipe can run${also}.`, warnings ? "warn" : "good", [], { ...told, resolved });
}

function refuse(error) {
  const problem = error.problem;
  if (!problem?.code) {
    plan.asked = null;
    tell(error.message, "bad");
    return;
  }
  let problems = (problem.errors ?? []).map(({ detail, pointer }) => ({ detail, pointer: pointer ?? "#" }));
  if (!problems.length) {
    const line = /line (\d+)/.exec(problem.detail)?.[1];
    problems = [{ detail: problem.detail, pointer: null, line: line ? Number(line) : null }];
  }
  const count = problems.length;
  tell(count === 1 ? "There is a problem with this recipe." : `There are ${count} problems with this recipe.`, "bad", problems);
}

function placeOf({ pointer, line }) {
  const { recipe } = state;
  const text = recipe.text;
  if (pointer !== null) return recipe.place(pointer);
  const lines = text.split("\n");
  const at = Math.min(Math.max((line ?? 1) - 1, 0), lines.length - 1);
  const start = lines.slice(0, at).reduce((sum, each) => sum + each.length + 1, 0);
  const indent = lines[at].length - lines[at].trimStart().length;
  return [start + indent, start + lines[at].length];
}

/** Under the text, in the text and in the form. */
function showProblems() {
  const { problems } = state;
  const list = find("problems");
  list.hidden = problems.length === 0;
  editor.area.setAttribute("aria-invalid", String(problems.length > 0));
  editor.area.setAttribute("aria-describedby", problems.length ? "verdict problems" : "verdict");
  editor.underline(problems.map(placeOf));
  list.replaceChildren(
    ...problems.map((each) => {
      const where = each.pointer === null ? (each.line ? `line ${each.line}` : "the recipe") : each.pointer.replace(/^#\/?/, "") || "the recipe";
      const link = element("a", { href: "#recipe" }, element("code", { textContent: where }));
      link.addEventListener("click", (event) => {
        event.preventDefault();
        editor.goTo(placeOf(each));
      });
      return element("li", {}, link, `: ${each.detail}`);
    }),
  );
  for (const field of document.querySelectorAll("#recipe-form [data-pointer]")) {
    const mine = problems.find((each) => each.pointer === field.dataset.pointer);
    const place = find(`${field.id}-problem`);
    if (mine) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
    if (place) place.textContent = mine?.detail ?? "";
  }
}

function figure(name, value) {
  return element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }));
}

function drawPlan(told) {
  const times = told.passes === 1 ? "" : ` in ${told.passes} passes`;
  const most = told.bytes_written_at_most ? "at most " : "";
  const figures = element(
    "dl",
    { className: "figures" },
    figure("Reads", sized(told.bytes_read) + times),
    figure("Writes", most + sized(told.bytes_written)),
    figure("Disk", sized(told.bytes_on_disk)),
    figure("Memory", sized(told.peak_memory)),
    figure("Tensors merged", `${told.tensors_merged} of ${told.tensors}`),
    figure("Files", String(told.shards.length)),
  );
  const found = [figures];
  const listed = (title, lines, isOpen) => {
    if (!lines.length) return;
    const list = element("ul", { className: "small" }, ...lines.map((line) => element("li", { textContent: line })));
    found.push(element("details", { open: isOpen }, element("summary", { textContent: title }), list));
  };
  listed(`${told.warnings.length} ${told.warnings.length === 1 ? "warning" : "warnings"}`, told.warnings, true);
  listed(`${told.left_out.length} tensors are left out`, told.left_out, false);
  listed("Commits that the names mean now", told.resolved.map((each) => `${each.path}: ${each.commit.slice(0, 12)}`), false);
  return found;
}

/* Recipes from elsewhere. */

/** Put what somebody brought into the editor: a recipe as it is written, or the one in a model card. */
async function bring(text) {
  if (new Blob([text]).size > MAX_CARD) {
    notify(`That is too large for a recipe: at most ${sized(MAX_CARD)} are read.`, "bad");
    return;
  }
  let found;
  try {
    found = await ask("/v1/recipes:import", { method: "POST", headers: { "Content-Type": "text/markdown" }, body: text });
  } catch (error) {
    if (/^(---|```|~~~|# )/m.test(text)) notify(error.message, "bad");
    if (!/^```|^~~~/m.test(text)) replace(text);
    return;
  }
  replace(found.found_in === "recipe" && !found.ignored.length ? text : found.yaml);
  if (found.ignored.length) {
    const lines = found.ignored.map((each) => `${each.pointer.replace(/^#\/?/, "")}: ${each.what}`);
    notify(`Left out, for it has no effect. ${lines.join(". ")}.`, "warn");
  }
}

function isCard(text) {
  return /^ *(```|~~~)/m.test(text) && /merge_method/.test(text);
}

editor.area.addEventListener("paste", (event) => {
  const text = event.clipboardData?.getData("text/plain") ?? "";
  const { selectionStart, selectionEnd, value } = editor.area;
  const isAll = value.slice(0, selectionStart).trim() === "" && value.slice(selectionEnd).trim() === "";
  const isRecipe = isAll && /^ *-? *["']?merge_method/m.test(text);
  if (!isCard(text) && !isRecipe) return;
  event.preventDefault();
  bring(text);
});

const sheet = find("editor");
for (const name of ["dragenter", "dragover"]) {
  sheet.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    sheet.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) sheet.addEventListener(name, () => sheet.classList.remove("over"));
sheet.addEventListener("drop", async (event) => {
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  await openFile(file);
});

async function openFile(file) {
  if (file.size > MAX_CARD) notify(`${file.name} is too large for a recipe: at most ${sized(MAX_CARD)} are read.`, "bad");
  else await bring(await file.text());
}

find("open-file").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) await openFile(file);
  event.target.value = "";
});
document.querySelector("[data-copy-recipe]").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(editor.text);
    notify("The recipe was copied.");
  } catch {
    notify("This browser does not let pages copy here; select the text instead.", "bad");
  }
});

/* Running it. */

/** The query of a job's options. Throws where one is not as it should be. */
function options() {
  const query = new URLSearchParams();
  for (const line of find("labels").value.split("\n").map((each) => each.trim()).filter(Boolean)) query.append("label", line);
  const priority = find("priority").valueAsNumber;
  if (!Number.isNaN(priority)) query.set("priority", priority);
  const minutes = find("deadline").valueAsNumber;
  if (!Number.isNaN(minutes)) query.set("deadline", Math.round(minutes * 60));
  return query;
}

function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16).padStart(2, "0")).join("");
}

/** One key for one wish, so that asking twice makes one job. */
const wish = { what: null, key: "" };

async function send({ isDry }) {
  const query = options();
  if (isDry) query.set("dry_run", "true");
  const body = editor.text;
  const what = `${query} ${body}`;
  if (wish.what !== what) Object.assign(wish, { what, key: randomKey() });
  const headers = { ...YAML_BODY, ...(isDry ? {} : { "Idempotency-Key": wish.key }) };
  return ask(`/v1/merges?${query}`, { method: "POST", headers, body });
}

async function run(isDry) {
  const buttons = [find("merge"), find("dry-run")];
  if (!editor.text.trim()) {
    notify("There is no recipe yet.", "bad");
    return;
  }
  buttons.forEach((each) => (each.disabled = true));
  try {
    const answer = await send({ isDry });
    if (isDry) {
      plan.asked = editor.text;
      accept(answer);
      notify("This would be accepted. Nothing was made.");
    } else {
      wish.what = null;
      location.assign(`/jobs/${answer.id}`);
    }
  } catch (error) {
    const errors = error.problem?.errors ?? [];
    if (errors.length && errors.every((each) => !/^#\/(query|header|path|body)\b/.test(each.pointer ?? "#"))) {
      plan.asked = editor.text;
      refuse(error);
    }
    notify(error.message, "bad");
  } finally {
    buttons.forEach((each) => (each.disabled = false));
  }
}

find("submit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(false);
});
find("dry-run").addEventListener("click", () => find("submit-form").reportValidity() && run(true));
// What is wrong can only be shown where it is open.
find("submit-form").addEventListener("invalid", () => (find("submit-form").querySelector("details").open = true), true);

/* The beginning. */

find("recipe-form").addEventListener("submit", (event) => event.preventDefault());
find("method").addEventListener("change", (event) => {
  setMethod(event.target.value, "mergekit");
  find("method").focus();
});
let reading = 0;
editor.area.addEventListener("input", () => {
  keepDraft();
  plan.soon();
  clearTimeout(reading);
  reading = setTimeout(() => take(editor.text, "text"), 150);
});
find("look-again").addEventListener("click", async () => {
  await lookForModels();
  drawForm();
  showExamples();
  plan.again();
});

async function begin() {
  const [methods] = await Promise.all([ask("/v1/methods"), lookForModels()]);
  state.methods = methods.data;
  const query = new URLSearchParams(location.search);
  take(readDraft(), "outside");
  if (query.has("from")) {
    const id = encodeURIComponent(query.get("from"));
    const path = id.startsWith("sch_") ? `/v1/searches/${id}/files/recipe.yml` : `/v1/merges/${id}/recipe`;
    await ask(path, { headers: { Accept: "application/yaml" } }).then(replace, (error) => notify(error.message, "bad"));
  }
  const name = query.get("method");
  if (methodsNamed(name).length) setMethod(name, query.get("semantics") ?? "mergekit");
  if (query.size) history.replaceState(null, "", location.pathname);
  root.dataset.ready = "";
}

begin().catch((error) => notify(error.message, "bad"));
