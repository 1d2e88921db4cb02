// A part of a job's page that is made anew by the service: asked for at first, and whenever it may have changed.

const PAUSE = 1500;

/** Keeps the element with this id as its `data-from` has it; what is returned asks for it again. */
export function keepShown(id) {
  const place = () => document.getElementById(id);
  let isAsking = false;
  let isAskedAgain = false;

  async function show() {
    const answer = await fetch(place().dataset.from);
    const how = { target: place(), sourceElement: place(), swap: "innerMorph" };
    if (answer.ok) await htmx.swap({ text: await answer.text(), ...how });
    place().setAttribute("aria-busy", "false");
  }

  /** Once at a time and not too often: each time all of it is drawn. */
  async function showSoon() {
    isAskedAgain = true;
    if (isAsking) return;
    isAsking = true;
    while (isAskedAgain && !document.hidden) {
      isAskedAgain = false;
      try {
        await show();
      } catch {
        // Whoever holds the stream tells that nothing answers, and says when it does.
      }
      await new Promise((done) => setTimeout(done, PAUSE));
    }
    isAsking = false;
  }

  document.addEventListener("job-changed", showSoon);
  document.addEventListener("visibilitychange", () => document.hidden || showSoon());
  showSoon();
  return showSoon;
}
