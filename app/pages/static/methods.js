// The methods that are shown follow what is typed, as the form's answer would.

const form = document.getElementById("method-filter");
const cards = [...document.querySelectorAll(".method")];
const count = document.getElementById("count");

function filter() {
  const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
  const needs = form.needs.value;
  for (const card of cards) {
    const has = words.every((word) => card.dataset.text.includes(word));
    card.hidden = !has || (needs !== "" && !card.dataset.needs.split(" ").includes(needs));
  }
  count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} methods`;
  const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
}

/** A link to a method that is not shown now shows it. */
function reveal() {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!card?.hidden) return;
  card.hidden = false;
  card.scrollIntoView();
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  filter();
});
form.querySelector("button").hidden = true;
addEventListener("hashchange", reveal);
reveal();
