// The fields of a recipe: drawn from the method's JSON Schema, each beside what the text has for it.

import { valueOf } from "./recipe.js";

const DTYPES = ["bfloat16", "float16", "float32", "float64"];
const BASES = {
  required: "What the models were tuned from.",
  optional: "May be left away. With it, what is merged is what the models learned.",
  model: "Not needed here: it counts as one of the models.",
};

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Draw the form of one document of a recipe into a place. */
export function drawFields(place, about) {
  const { recipe, index, method, models } = about;
  const list = element("datalist", { id: "models-there-are" });
  list.append(...models.map((each) => element("option", { value: each.name, label: each.architecture ?? each.kind })));
  const made = [list];
  if (method && about.meanings.length > 1) made.push(meaningField(about));
  made.push(textField(about, ["base_model"], { label: "Base model", hint: method ? BASES[method.base] : "", list: list.id }));
  made.push(modelsFields(about, list.id));
  if (method) made.push(...parameterFields(about));
  made.push(outputFields(about));
  const focused = document.activeElement?.id;
  place.replaceChildren(...made);
  if (focused && place.querySelector(`#${CSS.escape(focused)}`)) document.getElementById(focused).focus();
}

/* Fields. */

function identity(about, path) {
  return `field-${about.index}-${path.join("-")}`;
}

/** A label, a control, what it is for, and a place for what is wrong with it. */
function field(about, path, control, { label, hint = "" }) {
  const id = identity(about, path);
  Object.assign(control, { id });
  control.dataset.pointer = about.recipe.pointer(about.index, path);
  control.setAttribute("aria-describedby", `${id}-hint ${id}-problem`);
  return element(
    "div",
    {},
    element("label", { htmlFor: id, textContent: label }),
    control,
    element("p", { id: `${id}-hint`, className: "hint", textContent: hint }),
    element("p", { id: `${id}-problem`, className: "problem" }),
  );
}

/** What is written in a way that no field can show: as it is, and the way to it. */
function givenField(about, path, written, { label, hint = "" }) {
  const button = element("button", { type: "button", className: "quiet", textContent: "Change in the text" });
  const pointer = about.recipe.pointer(about.index, path);
  button.addEventListener("click", () => about.goTo(pointer));
  button.setAttribute("aria-label", `Change ${label} in the text`);
  return element(
    "div",
    {},
    element("span", { className: "label", textContent: label }),
    element("div", { className: "given" }, element("code", { textContent: cases(written) }), button),
    element("p", { className: "hint", textContent: hint }),
  );
}

/** A list of `{filter, value}` in words; anything else as it is. */
function cases(written) {
  const data = JSON.parse(written);
  const isCases = Array.isArray(data) && data.every((each) => each && typeof each === "object" && "value" in each);
  if (!isCases) return written;
  const shown = (value) => (Array.isArray(value) ? `[${value.join(", ")}]` : String(value));
  return data.map((each) => `${each.filter === undefined || each.filter === "*" ? "else" : each.filter}: ${shown(each.value)}`).join("; ");
}

function textField(about, path, { label, hint = "", list = "", placeholder = "", numeric = false, isName = !numeric }) {
  const written = about.recipe.written(about.index, path);
  if (written.kind === "other") return givenField(about, path, written.text, { label, hint });
  const input = element("input", { type: "text", value: written.text, placeholder, spellcheck: false, autocapitalize: "off" });
  if (list) input.setAttribute("list", list);
  if (numeric) input.inputMode = "decimal";
  input.addEventListener("input", () => {
    const text = input.value.trim();
    const value = isName ? text || undefined : valueOf(text);
    about.change((recipe) => recipe.with(about.index, path, value));
  });
  const more = written.kind === "gradient" ? "A gradient, from the first layer to the last. " : "";
  return field(about, path, input, { label, hint: more + hint });
}

function choiceField(about, path, choices, { label, hint = "", none = "" }) {
  const written = about.recipe.written(about.index, path);
  if (written.kind === "other") return givenField(about, path, written.text, { label, hint });
  const select = element("select");
  const offered = none === null ? choices : [["", none], ...choices];
  if (!offered.some(([value]) => value === written.text)) offered.push([written.text, written.text]);
  select.append(...offered.map(([value, name]) => element("option", { value, textContent: name })));
  select.value = written.text;
  select.addEventListener("change", () => about.change((recipe) => recipe.with(about.index, path, valueOf(select.value))));
  return field(about, path, select, { label, hint });
}

/* Methods with two meanings. */

function meaningField(about) {
  const names = { mergekit: "as mergekit has it", paper: "as the paper has it" };
  const select = element("select");
  select.append(...about.meanings.map((each) => element("option", { value: each.semantics, textContent: names[each.semantics] ?? each.semantics })));
  select.value = about.method.semantics;
  select.addEventListener("change", () => about.setMethod(about.method.name, select.value));
  return field(about, ["semantics"], select, { label: "Meaning", hint: "The same name means two things; their parameters differ." });
}

/* Models. */

function modelsFields(about, list) {
  const { recipe, index, method } = about;
  const other = ["slices", "modules"].find((key) => recipe.get(index, [key]));
  const fieldset = element("fieldset", {}, element("legend", { textContent: "Models" }));
  if (other) {
    const words = `This recipe is made of ${other}, which are changed in the text. `;
    const button = element("button", { type: "button", textContent: `Go to ${other}` });
    button.addEventListener("click", () => about.goTo(recipe.pointer(index, [other])));
    fieldset.append(element("p", { textContent: words }), button);
    return fieldset;
  }
  const entries = recipe.get(index, ["models"]);
  const count = Array.isArray(entries) ? entries.length : 0;
  for (let i = 0; i < count; i++) fieldset.append(modelFields(about, i, count, list));
  const { min = 1, max = null } = method?.models ?? {};
  const add = element("button", { type: "button", id: "add-model", textContent: "Add a model", disabled: max !== null && count >= max });
  add.addEventListener("click", () => {
    const taken = new Set([recipe.get(index, ["base_model"]), ...(entries ?? []).map((each) => each?.model)]);
    const free = about.models.find((each) => each.kind === "model" && !taken.has(each.name));
    about.change((now) => now.withList(index, ["models"], (items, node) => items.push(node({ model: free?.name ?? "" }))), true);
    document.getElementById(identity(about, ["models", count, "model"]))?.focus();
  });
  const wanted = max === min ? `takes ${min}` : `takes ${min} or more${max === null ? "" : `, at most ${max}`}`;
  const beside = method && method.base !== "model" ? " besides the base" : "";
  const hint = method ? `${method.name} ${wanted}${beside}. Names from the service's folders, or org/name on the Hub.` : "";
  fieldset.append(element("div", { className: "row" }, add), element("p", { className: "hint", textContent: hint }));
  return fieldset;
}

function modelFields(about, i, count, list) {
  const { index, method, recipe } = about;
  const path = ["models", i, "model"];
  const written = recipe.written(index, path);
  const name = written.text || `model ${i + 1}`;
  const moves = [
    ["↑", `Move ${name} up`, i > 0, (items) => items.splice(i - 1, 0, ...items.splice(i, 1)), i - 1],
    ["↓", `Move ${name} down`, i + 1 < count, (items) => items.splice(i + 1, 0, ...items.splice(i, 1)), i + 1],
    ["×", `Remove ${name}`, count > 1, (items) => items.splice(i, 1), Math.max(0, i - 1)],
  ].map(([sign, label, isPossible, move, next]) => {
    const button = element("button", { type: "button", className: "quiet icon", textContent: sign, title: label, disabled: !isPossible });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => {
      about.change((now) => now.withList(index, ["models"], move), true);
      document.getElementById(identity(about, ["models", next, "model"]))?.focus();
    });
    return button;
  });
  const main = textField(about, path, { label: `Model ${i + 1}`, list });
  const control = main.querySelector("input");
  if (control) {
    const row = element("div", { className: "row" });
    control.replaceWith(row);
    row.append(control, ...moves);
  } else main.append(element("div", { className: "row" }, ...moves));
  const parameters = element("div", { className: "pair" });
  for (const parameter of method?.per_model ?? []) {
    const shared = recipe.written(index, ["parameters", parameter]);
    const placeholder = shared.kind === "none" ? undefined : `${cases(JSON.stringify(shared.text))} for all`.replaceAll('"', "");
    parameters.append(parameterField(about, [...path.slice(0, 2), "parameters", parameter], parameter, placeholder));
  }
  const own = method?.own_bases
    ? [textField(about, ["models", i, "base_model"], { label: "Its own base", hint: "What this model was tuned from.", list })]
    : [];
  return element("div", { className: "model" }, main, ...own, parameters);
}

/* Parameters. */

function parameterFields(about) {
  const { method, recipe, index } = about;
  const names = Object.keys(method.parameters.properties).filter((name) => {
    const isShared = !method.per_model.includes(name);
    return isShared || recipe.written(index, ["parameters", name]).kind !== "none";
  });
  if (!names.length) return [];
  const inert = names.filter((name) => /has no effect/.test(method.parameters.properties[name].description ?? ""));
  const shown = names.filter((name) => !inert.includes(name) || recipe.written(index, ["parameters", name]).kind !== "none");
  const pair = element("div", { className: "pair" }, ...shown.map((name) => parameterField(about, ["parameters", name], name)));
  return [element("fieldset", {}, element("legend", { textContent: "Parameters" }), pair)];
}

/** What a schema allows, in words. */
function range(schema) {
  const { minimum, maximum, exclusiveMinimum: above, exclusiveMaximum: below } = schema;
  const low = minimum ?? above;
  const high = maximum ?? below;
  if (low !== undefined && high !== undefined) {
    const limits = [above === undefined ? "" : `more than ${low}`, below === undefined ? "" : `less than ${high}`].filter(Boolean);
    return `${low} to ${high}${limits.length ? ` (${limits.join(", ")})` : ""}`;
  }
  if (low !== undefined) return above === undefined ? `at least ${low}` : `more than ${low}`;
  if (high !== undefined) return below === undefined ? `at most ${high}` : `less than ${high}`;
  return "";
}

function parameterField(about, path, name, placeholder) {
  const outer = about.method.parameters.properties[name];
  const inner = outer.type === "array" ? outer.items : (outer.anyOf?.find((each) => each.type !== "null") ?? outer);
  const usual = Array.isArray(outer.default) ? outer.default[0] : outer.default;
  const isRequired = (about.method.parameters.required ?? []).includes(name);
  const limits = range(inner);
  const said = outer.description ?? "";
  const isFirst = path[0] !== "models" || path[1] === 0;
  const hint = isFirst ? [said, said.includes(limits) ? "" : limits].filter(Boolean).join("; ") : "";
  if (inner.type === "boolean") {
    const none = placeholder ?? `as usual: ${usual ? "yes" : "no"}`;
    return choiceField(about, path, [["true", "yes"], ["false", "no"]], { label: name, hint, none });
  }
  if (inner.enum) {
    return choiceField(about, path, inner.enum.map((each) => [each, each]), { label: name, hint, none: `as usual: ${usual}` });
  }
  const numeric = ["number", "integer"].includes(inner.type) || Boolean(inner.anyOf);
  const shown = placeholder ?? (usual === undefined || usual === null ? (isRequired ? "needed" : "none") : String(usual));
  return textField(about, path, { label: name, hint, placeholder: shown, numeric, isName: inner.type === "string" });
}

/* The output. */

function outputFields(about) {
  const { method, recipe, index, models } = about;
  const older = recipe.written(index, ["tokenizer_source"]).kind !== "none";
  const key = recipe.written(index, ["out_dtype"]).kind === "none" ? "dtype" : "out_dtype";
  const sources = element("datalist", { id: "tokenizers-there-are" });
  sources.append(...["union", "base", ...models.map((each) => each.name)].map((value) => element("option", { value })));
  const pair = element(
    "div",
    { className: "pair" },
    choiceField(about, [key], DTYPES.map((each) => [each, each]), { label: "Number format", none: "as in the base", hint: "Of the output; the arithmetic is float32." }),
    textField(about, older ? ["tokenizer_source"] : ["tokenizer", "source"], {
      ...{ label: "Tokenizer", list: sources.id, placeholder: "as in the base" },
      hint: "union: all models' tokens; base; or a model's name.",
    }),
  );
  if ((method?.scopes.length ?? 0) > 1) {
    const [usual] = method.scopes;
    const choices = method.scopes.map((each) => [each, each === "model" ? "the whole model" : "each tensor"]);
    const hint = `Usually over ${usual === "model" ? "the whole model" : "each tensor"}.`;
    pair.append(choiceField(about, ["scope"], choices, { label: "Thresholds are taken over", none: "as usual", hint }));
  }
  pair.append(textField(about, ["seed"], { label: "Seed", placeholder: "0", numeric: true, hint: "Of all random numbers: the same seed, the same bytes." }));
  return element("fieldset", {}, element("legend", { textContent: "Output" }), sources, pair);
}
