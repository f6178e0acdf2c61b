// The images and their requests: one at a time, the current image first.

import { Problem, segment } from "./api.js";

// One image. `state` is waiting, working, done, failed or cancelled. An earlier answer is kept until the next one.
export class Entry {
  constructor(file) {
    this.file = file;
    this.name = file.name || "image";
    this.url = URL.createObjectURL(file);
    this.state = "waiting";
    this.answer = this.text = this.problem = this.seconds = null;
  }
}

export class Queue {
  // `settings()` returns the model and the options of a request. `onChange(entry)` is called when the state of an
  // entry has changed, `onAnswer(entry)` when an answer has come, `onToken()` when a token is needed.
  constructor({ settings, onChange, onAnswer, onToken }) {
    Object.assign(this, { settings, onChange, onAnswer, onToken });
    this.entries = [];
    this.current = this.working = null;
    this.isBusy = false;
  }

  get waiting() {
    return this.entries.filter((entry) => entry.state === "waiting");
  }

  add(files) {
    const added = [...files].map((file) => new Entry(file));
    this.entries.push(...added);
    return added;
  }

  remove(entry) {
    this.entries = this.entries.filter((other) => other !== entry);
    if (this.working === entry) this.controller.abort();
    URL.revokeObjectURL(entry.url);
  }

  // Segments all images again; the settings have changed.
  restart(entries = this.entries) {
    for (const entry of entries) this.change(entry, "waiting");
    if (entries.includes(this.working)) this.controller.abort();
    this.work();
  }

  cancel() {
    for (const entry of this.waiting) this.change(entry, "cancelled");
    this.controller?.abort();
  }

  change(entry, state) {
    entry.state = state;
    this.onChange(entry);
  }

  async work() {
    while (!this.working && this.waiting.length) {
      const entry = this.working = this.waiting.includes(this.current) ? this.current : this.waiting[0];
      this.controller = new AbortController();
      this.started = performance.now();
      this.change(entry, "working");
      const isAllowed = await this.segment(entry);
      this.working = null;
      this.onChange(entry);
      if (!isAllowed) return this.onToken();
    }
  }

  // Returns false if a token is needed.
  async segment(entry) {
    const { model, options } = this.settings();
    this.isBusy = false;
    try {
      const { signal } = this.controller;
      entry.text = await segment(model, entry.file, options, { signal, onBusy: () => (this.isBusy = true) });
    } catch (problem) {
      return this.fail(entry, problem);
    }
    entry.answer = JSON.parse(entry.text);
    entry.problem = null;
    entry.seconds = (performance.now() - this.started) / 1000;
    entry.state = "done";
    this.onAnswer(entry);
    return true;
  }

  fail(entry, problem) {
    if (problem.name === "AbortError") {
      if (entry.state === "working") entry.state = "cancelled"; // or it waits, because the settings have changed
      return true;
    }
    if (problem.status === 401) {
      entry.state = "waiting";
      return false;
    }
    entry.problem = problem instanceof Problem ? problem : new Problem({ found: String(problem) });
    entry.state = "failed";
    return true;
  }
}
