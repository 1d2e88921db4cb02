// Recipes that run with the models there are.

import { textOf } from "./recipe.js";

const RATHER_BASE = /(^|[^a-z])(base|pretrained|foundation)([^a-z]|$)/i;

/** The largest set of models that are built alike, the one that the others may have been tuned from first. */
export function family(models) {
  const families = new Map();
  for (const model of models.filter((each) => each.kind === "model")) {
    const build = JSON.stringify([model.architecture, model.layers, model.hidden_size, model.vocabulary]);
    families.set(build, [...(families.get(build) ?? []), model.name]);
  }
  const [names = []] = [...families.values()].sort((one, other) => other.length - one.length);
  const base = names.find((name) => RATHER_BASE.test(name)) ?? names[0];
  return base === undefined ? [] : [base, ...names.filter((name) => name !== base)];
}

const FEW = 3;

/** Titles and texts of recipes, the simplest first; none where there are no models. */
export function examples(models) {
  const [base, ...tuned] = family(models);
  const some = tuned.slice(0, FEW);
  const share = Math.round(100 / Math.max(1, some.length)) / 100;
  const each = (parameters) => some.map((model) => ({ model, ...(parameters ? { parameters } : {}) }));
  const found = [];
  if (base !== undefined && !tuned.length) {
    found.push(["A copy, in bfloat16", { merge_method: "passthrough", models: [{ model: base }], dtype: "bfloat16" }]);
  }
  if (tuned.length) {
    const all = [base, ...some];
    found.push([`Average of ${all.length} models`, { merge_method: "linear", models: all.map((model) => ({ model })), parameters: { weight: 1.0 } }]);
    found.push(["SLERP: half way between two", { merge_method: "slerp", base_model: base, models: [{ model: tuned[0] }], parameters: { t: 0.5 } }]);
    found.push(["Task arithmetic: add what was learned", { merge_method: "task_arithmetic", base_model: base, models: each({ weight: share }) }]);
    found.push(["WiSE-FT: half way back to the base", { merge_method: "wise_ft", base_model: base, models: [{ model: tuned[0] }], parameters: { alpha: 0.5 } }]);
  }
  if (tuned.length > 1) {
    found.push(["TIES: trim, vote, average", { merge_method: "ties", base_model: base, models: each({ weight: share, density: 0.5 }) }]);
    found.push(["DARE: drop at random, rescale", { merge_method: "dare_linear", base_model: base, models: each({ weight: share, density: 0.5 }), seed: 1 }]);
    found.push(["Model Stock: no numbers to choose", { merge_method: "model_stock", base_model: base, models: each() }]);
  }
  return found.map(([title, recipe]) => ({ title, text: textOf(recipe) }));
}
