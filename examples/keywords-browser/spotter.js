// Samples at 16 kHz in, probabilities of words out: spotter.c, the runtime and a network in one wasm module.
import { load } from './keywords.mjs';

const ROOM = 4096; // samples that fit into the module at once

export async function loadSpotter() {
  const get = async (name) => {
    const answer = await fetch(new URL(name, import.meta.url));
    if (!answer.ok) throw new Error(`${name} is missing: run build.py first.`);
    return answer.arrayBuffer();
  };
  const [code, file, words] = await Promise.all(['keywords.wasm', 'keywords.dtm', 'keywords.json'].map(get));
  const network = await load(code, file);
  const about = JSON.parse(new TextDecoder().decode(words));
  return new Spotter(network.c, about, { code: code.byteLength, network: file.byteLength });
}

class Spotter {
  constructor(c, { words, rate, hop }, bytes) {
    Object.assign(this, { c, words, rate, hop, bytes });
    if (c.spotter_open() !== words.length + 1) throw new Error('keywords.dtm does not fit keywords.json.');
    this.samples = new Float32Array(c.memory.buffer, c.spotter_samples(), ROOM);
    this.means = new Float32Array(c.memory.buffer, c.spotter_means(), words.length + 1);
  }

  reset() {
    this.c.spotter_reset();
  }

  // Calls each(means) at every frame of 10 ms: a probability for each word, and one for anything else.
  push(sound, each = () => {}) {
    for (let from = 0; from < sound.length; from += ROOM) {
      const part = sound.subarray(from, from + ROOM);
      this.samples.set(part);
      for (let at = 0; at < part.length; ) {
        const taken = this.c.spotter_push(at, part.length - at);
        at += Math.abs(taken);
        if (taken < 0) each(this.means);
      }
    }
  }

  // Microseconds for a frame, features and network: of the quickest of some rounds, each long enough for a coarse clock.
  microseconds(rounds = 5, frames = 100) {
    const noise = Float32Array.from({ length: frames * this.hop }, () => Math.random() - 0.5);
    const took = Array.from({ length: rounds }, () => {
      const began = performance.now();
      this.push(noise);
      return performance.now() - began;
    });
    this.reset();
    return (1000 * Math.min(...took)) / frames;
  }
}
