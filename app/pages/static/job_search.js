// The trials of a search: asked for again when there are more of them.

import { keepShown } from "./part.js";

const showSoon = keepShown("trials");
let known;
document.addEventListener("job-progress", ({ detail }) => {
  if (detail.trials_done === known) return;
  known = detail.trials_done;
  showSoon();
});
