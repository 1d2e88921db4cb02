// The list stays as the jobs are: asked for again every two seconds while one of them is active and somebody looks.

import { tellTimes } from "./times.js";

const SECONDS = 2;
const MOST_SECONDS = 30;
let wait = SECONDS;
let timer;

async function refresh() {
  clearTimeout(timer);
  const list = document.getElementById("jobs");
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch(location.href, { headers: { "HX-Request": "true" } });
    if (answer.redirected) return location.reload(); // to where one signs in
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    await htmx.swap({ text, target: list, sourceElement: list, swap: "outerMorph" });
    lost.hidden = true;
    wait = SECONDS;
  } catch {
    lost.hidden = false;
    wait = Math.min(wait * 2, MOST_SECONDS);
  }
  tellTimes();
  goOn();
}

function goOn() {
  clearTimeout(timer);
  const isLost = !document.getElementById("lost").hidden;
  const isActive = document.getElementById("jobs").hasAttribute("data-active");
  if (!document.hidden && (isActive || isLost)) timer = setTimeout(refresh, wait * 1000);
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));
addEventListener("pageshow", (event) => event.persisted && refresh());
for (const each of document.querySelectorAll(".filters select")) {
  each.addEventListener("change", () => each.form.requestSubmit());
}
goOn();
