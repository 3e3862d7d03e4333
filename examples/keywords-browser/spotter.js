// The wasm module: samples at 16 kHz in, probabilities of words out.

const ROOM = 4096; // samples that fit into the module at once

export async function loadSpotter(base = new URL('.', import.meta.url)) {
  const get = async (name) => {
    const answer = await fetch(new URL(name, base));
    if (!answer.ok) throw new Error(`${name} is missing: run build.py first.`);
    return answer.arrayBuffer();
  };
  const [code, file, words] = await Promise.all([get('spotter.wasm'), get('keywords.dt'), get('keywords.json')]);
  const { instance } = await WebAssembly.instantiate(code, {});
  return new Spotter(instance.exports, file, JSON.parse(new TextDecoder().decode(words)), code.byteLength);
}

class Spotter {
  constructor(wasm, file, { words, rate, hop }, codeBytes) {
    Object.assign(this, { wasm, words, rate, hop, codeBytes, fileBytes: file.byteLength });
    const at = wasm.spotter_file(file.byteLength);
    new Uint8Array(wasm.memory.buffer, at, file.byteLength).set(new Uint8Array(file));
    this.classes = wasm.spotter_open(file.byteLength);
    if (this.classes !== words.length + 1) throw new Error(`keywords.dt cannot be used: error ${-this.classes}.`);
    this.samples = new Float32Array(wasm.memory.buffer, wasm.spotter_samples(), ROOM);
    this.means = new Float32Array(wasm.memory.buffer, wasm.spotter_means(), this.classes);
  }

  reset() {
    this.wasm.spotter_reset();
  }

  // Calls each(means) at every frame of 10 ms: a probability for each word, and one for anything else.
  push(sound, each = () => {}) {
    for (let from = 0; from < sound.length; from += ROOM) {
      const part = sound.subarray(from, from + ROOM);
      this.samples.set(part);
      for (let at = 0; at < part.length; ) {
        const taken = this.wasm.spotter_push(at, part.length - at);
        at += taken < 0 ? -1 - taken : taken;
        if (taken < 0) each(this.means);
      }
    }
  }

  // Microseconds for a frame: samples, features, network. The clock is coarse, so many frames are taken.
  microseconds(frames = 300) {
    const noise = Float32Array.from({ length: frames * this.hop }, () => Math.random() - 0.5);
    this.reset();
    this.push(noise);
    const began = performance.now();
    this.push(noise);
    const took = performance.now() - began;
    this.reset();
    return (1000 * took) / frames;
  }
}
