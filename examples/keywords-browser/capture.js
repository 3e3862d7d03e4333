// Hands the microphone's samples to the page, a twentieth of a second at a time.
registerProcessor('capture', class extends AudioWorkletProcessor {
  block = new Float32Array(800);
  filled = 0;

  process([[channel]]) {
    for (const sample of channel ?? []) {
      this.block[this.filled++] = sample;
      if (this.filled === this.block.length) {
        this.port.postMessage(this.block);
        this.filled = 0;
      }
    }
    return true;
  }
});
