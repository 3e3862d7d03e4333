// A network of libdeepthin in JavaScript: `load` takes the bytes of the runtime and of a flat file (deepthin export --to wasm).
const REASONS = { 1: "its format is wrong", 2: "its version is unknown", 3: "its checksum is wrong", [-1]: "there is no memory for it" };

/**
 * Load a network.
 * @param {BufferSource} runtime Bytes of the .wasm file.
 * @param {Uint8Array | ArrayBuffer} file Bytes of the .dtm file.
 * @returns {Promise<Network>} The network, ready to run.
 */
export async function load(runtime, file) {
  const { instance } = await WebAssembly.instantiate(runtime, {});
  return new Network(instance.exports, new Uint8Array(file));
}

export class Network {
  constructor(exports, file) {
    this.c = exports;
    const at = exports.wasm_memory(file.length);
    this.bytes(at, file.length).set(file);
    const status = exports.wasm_open(at, file.length);
    if (status) throw new Error(`The network cannot be loaded: ${REASONS[status] ?? status}.`);
    this.inputs = this.sizes(0);
    this.outputs = this.sizes(1);
  }

  sizes(side) {
    const found = [];
    for (let size; (size = this.c.wasm_floats(side, found.length)); ) found.push(size);
    return found;
  }

  bytes(at, length) {
    return new Uint8Array(this.c.memory.buffer, at, length); // memory moves when it grows, so no view is kept
  }

  /**
   * Run once.
   * @param {...(Float32Array | Int32Array)} inputs Of the sizes in `inputs`.
   * @returns {Float32Array[]} Outputs, of the sizes in `outputs`.
   */
  run(...inputs) {
    inputs.forEach((input, index) => {
      if (input.length !== this.inputs[index]) throw new Error(`Input ${index} has ${this.inputs[index]} numbers, not ${input.length}.`);
      this.bytes(this.c.wasm_input(index), 4 * input.length).set(new Uint8Array(input.buffer, input.byteOffset, 4 * input.length));
    });
    this.c.wasm_run();
    return this.outputs.map((size, index) => new Float32Array(this.bytes(this.c.wasm_output(index), 4 * size).slice().buffer));
  }

  /** Forget what came before: zero the states of recurrent layers. */
  reset() {
    this.c.wasm_reset();
  }
}
