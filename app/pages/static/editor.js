// A text area with line numbers, in which places can be underlined.

/** Makes an editor of an element that has a `textarea`, a `.mirror` behind it and a `.gutter` beside it. */
export class Editor {
  constructor(element) {
    this.area = element.querySelector("textarea");
    this.mirror = element.querySelector(".mirror");
    this.gutter = element.querySelector(".gutter");
    this.marks = [];
    this.area.addEventListener("scroll", () => this.#follow());
    this.area.addEventListener("input", () => {
      this.marks = [];
      this.#show();
    });
    this.#show();
  }

  get text() {
    return this.area.value;
  }

  set text(text) {
    if (text === this.area.value) return;
    const { scrollTop, scrollLeft } = this.area;
    this.area.value = text;
    this.marks = [];
    this.#show();
    Object.assign(this.area, { scrollTop, scrollLeft });
    this.#follow();
  }

  /** Underline these places, `[start, end]` each. */
  underline(places) {
    this.marks = [...places].sort((one, other) => one[0] - other[0]);
    this.#show();
  }

  /** Put the cursor at a place, and select what is there. */
  goTo([start, end]) {
    this.area.focus();
    this.area.setSelectionRange(start, end);
    const line = this.text.slice(0, start).split("\n").length - 1;
    const height = parseFloat(getComputedStyle(this.area).lineHeight);
    const top = line * height;
    if (top < this.area.scrollTop || top + 2 * height > this.area.scrollTop + this.area.clientHeight) {
      this.area.scrollTop = Math.max(0, top - this.area.clientHeight / 3);
    }
    this.#follow();
  }

  #show() {
    const lines = this.text.split("\n").length;
    this.area.rows = Math.min(Math.max(lines + 1, 12), 30);
    if (this.lines !== lines) this.gutter.textContent = Array.from({ length: lines }, (_, i) => i + 1).join("\n");
    this.lines = lines;
    this.mirror.replaceChildren();
    let at = 0;
    for (const [start, end] of this.marks) {
      if (end <= at && start < at) continue;
      const from = Math.max(start, at);
      const mark = document.createElement("mark");
      mark.textContent = this.text.slice(from, end) || " ";
      this.mirror.append(this.text.slice(at, from), mark);
      at = Math.max(from, end);
    }
    this.mirror.append(this.text.slice(at));
    this.#follow();
  }

  #follow() {
    const { scrollTop, scrollLeft } = this.area;
    this.mirror.style.transform = `translate(${-scrollLeft}px, ${-scrollTop}px)`;
    this.gutter.style.transform = `translateY(${-scrollTop}px)`;
  }
}
