// A recipe's text as data: what stands where, and how a value is changed with all else left as it is.

import * as YAML from "./vendor/yaml/index.js";

/** What the service reads: YAML 1.1, where `no` is a truth value and not a text. */
const READING = { version: "1.1", aliasDuplicateObjects: false, prettyErrors: false, logLevel: "silent" };
const ORDER = [
  ...["name", "merge_method", "semantics", "scope", "seed", "base_model", "models", "slices", "modules", "parameters"],
  ...["dtype", "out_dtype", "tokenizer", "tokenizer_source"],
];
const NUMBER = /^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$/;

/** The parts of a JSON pointer. */
function partsOf(pointer) {
  return pointer.replace(/^#\/?/, "").split("/").filter(Boolean).map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
}

/** A number as every YAML reader takes it for one: an exponent has a sign, and a point before it. */
function numberText(written) {
  if (!/e/i.test(written)) return written;
  const [mantissa, exponent] = String(Number(written)).split("e");
  if (exponent === undefined) return mantissa;
  return `${mantissa.includes(".") ? mantissa : `${mantissa}.0`}e${exponent}`;
}

/** What somebody wrote into a field, as a value: undefined of nothing, a number, a list of a gradient, else a text. */
export function valueOf(written) {
  const text = written.trim();
  if (text === "") return undefined;
  if (NUMBER.test(text)) return new Numeral(numberText(text));
  if (text === "true" || text === "false") return text === "true";
  if (/^\[.*\]$/.test(text)) {
    const inside = text.slice(1, -1).split(",").map((each) => each.trim()).filter(Boolean);
    if (inside.length && inside.every((each) => NUMBER.test(each))) return inside.map((each) => new Numeral(numberText(each)));
  }
  return text;
}

/** A number that keeps how it was written. */
class Numeral {
  constructor(text) {
    this.text = text;
  }
}

/** What stands for a number until all is written: the library would write it in its own way. */
const stand = (i) => `NUMERAL-${i}-STANDS-HERE`;

/** Makes nodes of values, and puts the numbers in once they are text. */
class Maker {
  #numerals = [];

  node(document, value) {
    if (value instanceof Numeral) return new YAML.Scalar(stand(this.#numerals.push(value.text) - 1));
    if (!Array.isArray(value) || !value.length) return document.createNode(value);
    const list = document.createNode([], { flow: true });
    list.items = value.map((each) => this.node(document, each));
    return list;
  }

  finish(text) {
    return this.#numerals.reduce((done, numeral, i) => done.replace(stand(i), numeral), text);
  }
}

/** One text, read. */
export class Recipe {
  constructor(text) {
    this.text = text;
    this.all = [...YAML.parseAllDocuments(text, READING)];
    /** The documents that have something in them, as pointers count them. */
    this.documents = this.all.filter((each) => each.contents && !(YAML.isScalar(each.contents) && each.contents.value === null));
    this.errors = this.all.flatMap((each) => each.errors);
  }

  /** Whether there is anything that a form could show. */
  get isReadable() {
    return !this.errors.length && this.documents.length > 0 && this.documents.every((each) => YAML.isMap(each.contents));
  }

  get isEmpty() {
    return !this.errors.length && !this.documents.length;
  }

  /** The index of the document that a form shows: the one without a name, or else the last. */
  get output() {
    const unnamed = this.documents.findIndex((each) => YAML.isMap(each.contents) && !each.has("name"));
    return unnamed < 0 ? this.documents.length - 1 : unnamed;
  }

  /** Plain data at a path of a document; undefined where there is nothing. */
  get(index, path) {
    const node = this.documents[index]?.getIn(path, true);
    return YAML.isNode(node) ? node.toJS(this.documents[index]) : node;
  }

  /** How a value is written: `kind` is none, scalar, gradient or other; `text` is what a field shows of it. */
  written(index, path) {
    const node = this.documents[index]?.getIn(path, true);
    if (node === undefined || (YAML.isScalar(node) && node.value === null)) return { kind: "none", text: "" };
    if (YAML.isScalar(node)) {
      const isPlain = typeof node.value !== "string" && node.source !== undefined;
      return { kind: "scalar", text: isPlain ? node.source : String(node.value) };
    }
    if (YAML.isSeq(node) && node.items.every((each) => YAML.isScalar(each))) {
      return { kind: "gradient", text: `[${node.items.map((each) => each.source ?? each.value).join(", ")}]` };
    }
    return { kind: "other", text: YAML.isCollection(node) ? JSON.stringify(node.toJS(this.documents[index])) : String(node) };
  }

  /** The JSON pointer of a path of a document. */
  pointer(index, path) {
    const parts = (this.documents.length > 1 ? [index, ...path] : path).map((part) => String(part).replaceAll("~", "~0").replaceAll("/", "~1"));
    return ["#", ...parts].join("/");
  }

  /** Where in the text a pointer leads, as `[start, end]`: its key, or the nearest that is there. */
  place(pointer) {
    const parts = partsOf(pointer);
    let document = this.documents[0];
    if (this.documents.length > 1 && parts.length) document = this.documents[Number(parts.shift())];
    let node = document?.contents;
    let found = null;
    for (const part of parts) {
      if (YAML.isMap(node)) {
        const pair = node.items.find((each) => String(each.key?.value ?? each.key) === part);
        if (!pair) break;
        found = pair.key.range ?? found;
        node = pair.value;
      } else if (YAML.isSeq(node) && node.items[Number(part)]) {
        node = node.items[Number(part)];
        found = node.range ?? found;
      } else break;
    }
    found ??= node?.range ?? [0, this.text.length];
    const [start, end] = found;
    const stop = this.text.indexOf("\n", start);
    return [start, Math.max(start, Math.min(end, stop < 0 ? end : stop))];
  }

  /** The text with a value put at a path of a document, or taken away where it is undefined. Throws where the text is
   * written in a way that nothing can be put there.
   */
  with(index, path, value) {
    const document = this.documents[index];
    const node = document.getIn(path, true);
    const isOne = value !== undefined && (value instanceof Numeral || typeof value !== "object");
    if (isOne && YAML.isScalar(node) && node.range && node.range[1] > node.range[0] && !node.anchor && !node.tag && !String(node.type).startsWith("BLOCK")) {
      const made = this.#scalarText(document, value);
      return this.text.slice(0, node.range[0]) + made + this.text.slice(node.range[1]);
    }
    return this.#changed(index, (copy, maker) => put(copy, path, value, maker));
  }

  /** The text after `change` was done to a copy of a document. */
  #changed(index, change) {
    const copies = [...YAML.parseAllDocuments(this.text, READING)];
    const at = this.all.indexOf(this.documents[index]);
    const maker = new Maker();
    change(copies[at], maker);
    return maker.finish(copies.map((each) => each.toString(this.#style())).join(""));
  }

  /** The text with the list at a path changed by `change`, which gets its nodes. */
  withList(index, path, change) {
    return this.#changed(index, (copy, maker) => {
      if (!YAML.isSeq(copy.getIn(path, true))) put(copy, path, [], maker);
      const list = copy.getIn(path, true);
      list.flow = list.flow && list.items.length > 0;
      change(list.items, (value) => copy.createNode(value));
    });
  }

  #scalarText(document, value) {
    if (value instanceof Numeral) return value.text;
    const made = new YAML.Document(value, { version: "1.1" });
    return made.toString({ lineWidth: 0 }).trimEnd();
  }

  /** How this text is written, as far as that is a matter of taste. */
  #style() {
    const indent = /^[^\s#-][^\n]*:[ ]*\n( +)\S/m.exec(this.text)?.[1].length ?? 2;
    const isFlush = /^( *)[\w"']+:[ ]*\n\1- /m.test(this.text);
    return { lineWidth: 0, indent: Math.min(Math.max(indent, 2), 8), indentSeq: !isFlush, flowCollectionPadding: /[[{] /.test(this.text) };
  }
}

function put(document, path, value, maker) {
  if (value === undefined) {
    document.deleteIn(path);
    for (let i = path.length - 1; i > 0; i--) {
      const holder = document.getIn(path.slice(0, i), true);
      if (!["parameters", "tokenizer"].includes(path[i - 1]) || !YAML.isMap(holder) || holder.items.length) break;
      document.deleteIn(path.slice(0, i));
    }
    return;
  }
  for (let i = 1; i < path.length; i++) {
    const holder = document.getIn(path.slice(0, i), true);
    const isNothing = holder === undefined || (YAML.isScalar(holder) && holder.value === null);
    // Not left to the library, whose maps in YAML 1.1 may be ordered ones, which are lists.
    if (isNothing) set(document, path.slice(0, i), new YAML.YAMLMap(document.schema));
  }
  set(document, path, maker.node(document, value));
}

/** Put a node at a path; a new key at the top stands where one looks for it. */
function set(document, path, node) {
  const [first] = path;
  if (path.length > 1 || document.has(first)) {
    document.setIn(path, node);
    return;
  }
  const items = document.contents.items;
  const before = new Set(ORDER.slice(0, Math.max(0, ORDER.indexOf(first))));
  let at = ORDER.includes(first) ? 0 : items.length;
  if (at === 0) items.forEach((each, i) => (at = before.has(String(each.key)) ? i + 1 : at));
  items.splice(at, 0, document.createPair(first, node));
}

/** A recipe of plain data as text. */
export function textOf(data) {
  return new YAML.Document(data, { version: "1.1", aliasDuplicateObjects: false }).toString({ lineWidth: 0, flowCollectionPadding: false });
}
