// Compare models: the form, the running analysis, drawings as pictures.
import { ask, notify } from "./page.js";

const form = document.getElementById("ask");
const models = document.getElementById("models");

/** The inputs that say something, in order: those that the document's models come from. */
const given = () => [...models.querySelectorAll("input")].filter((input) => input.value.trim());

function showProblems(error) {
  const box = document.getElementById("problems");
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  box.replaceChildren();
  for (const { pointer, detail } of error.problem?.errors?.length ? error.problem.errors : [{ detail: error.message }]) {
    const [, key, place] = (pointer ?? "").split("/");
    const input = key === "models" ? (given()[place] ?? models.querySelector("input")) : form.elements[key];
    input?.setAttribute?.("aria-invalid", "true");
    const told = document.createElement("p");
    told.className = "notice bad";
    told.textContent = detail;
    box.append(told);
  }
  form.querySelector("[aria-invalid]")?.focus();
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button.primary");
  const asked = {
    base_model: form.elements.base_model.value.trim() || null,
    models: given().map((input) => input.value.trim()),
  };
  for (const name of ["density", "top", "exact_up_to"]) {
    if (form.elements[name].value !== "") asked[name] = Number(form.elements[name].value);
  }
  button.disabled = true;
  try {
    const job = await ask("/v1/analyses", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
    });
    location.assign(`/compare/${job.id}`);
  } catch (error) {
    button.disabled = false;
    showProblems(error);
  }
});

document.getElementById("more")?.addEventListener("click", (event) => {
  const number = models.querySelectorAll("input").length + 1;
  const [label, input] = ["label", "input"].map((kind) => document.createElement(kind));
  Object.assign(label, { className: "unseen", htmlFor: `model-${number}`, textContent: `Model ${number}` });
  Object.assign(input, { id: `model-${number}`, name: "model", autocomplete: "off", spellcheck: false });
  input.setAttribute("list", "known");
  models.append(label, input);
  input.focus();
  if (number === 16) event.target.remove();
});

const running = document.getElementById("running");
if (running) {
  const told = (id, text) => (document.getElementById(id).textContent = text);
  const events = new EventSource(`${running.dataset.job}/events`);
  events.addEventListener("state", (event) => told("state", JSON.parse(event.data).status));
  events.addEventListener("progress", (event) => {
    const at = JSON.parse(event.data);
    document.getElementById("bar").value = at.fraction ?? 0;
    if (at.phase) told("phase", at.phase);
    const left = at.seconds_left ? `, about ${Math.ceil(at.seconds_left)} s left` : "";
    if (at.tensors_total) told("at", `${at.tensors_done} of ${at.tensors_total} tensors${left}`);
  });
  events.addEventListener("done", () => {
    events.close();
    location.reload();
  });
  document.getElementById("cancel").addEventListener("click", async (event) => {
    event.target.disabled = true;
    try {
      await ask(`${running.dataset.job}/cancel`, { method: "POST" });
    } catch (error) {
      notify(error.message, "bad");
    }
  });
}

const LOOKS = ["fill", "stroke", "font-family", "font-size", "font-weight"];

/** A drawing as it looks now, as a PNG of twice its size. */
async function picture(svg) {
  const copy = svg.cloneNode(true);
  const [shapes, copies] = [svg, copy].map((each) => [...each.querySelectorAll("*")]);
  shapes.forEach((shape, i) => {
    const look = getComputedStyle(shape);
    for (const name of LOOKS) copies[i].setAttribute(name, look.getPropertyValue(name));
  });
  const [width, height] = ["width", "height"].map((side) => Number(svg.getAttribute(side)));
  const address = URL.createObjectURL(
    new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }),
  );
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(svg.closest(".card")).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((done) => canvas.toBlob(done, "image/png"));
  } finally {
    URL.revokeObjectURL(address);
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-png]");
  if (!button) return;
  try {
    const drawn = await picture(document.getElementById(button.dataset.png).querySelector("svg"));
    const link = Object.assign(document.createElement("a"), {
      href: URL.createObjectURL(drawn),
      download: button.dataset.name,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch {
    notify("This browser cannot make a picture of it; weightsmith inspect --png can.", "bad");
  }
});
