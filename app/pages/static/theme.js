// Runs before the first paint, so that nobody sees the wrong theme first.
const chosen = localStorage.getItem("theme");
if (chosen) document.documentElement.dataset.theme = chosen;
