"""Sound whose pitch is known: tones, vowels and speech, each synthesised from a given contour of the fundamental.

Speech: espeak-ng speaks; the spectral envelope of what it says, by the cepstrum, filters pulses of the given contour
(the source-filter model). So the words and the voice are those of espeak-ng and the pitch is ours.
"""

import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Signal = NDArray[np.float64]  # samples at RATE
RATE = 16_000  # Hz
FRAME, HOP, BINS = 512, 128, 513  # of the filter: samples, samples, frequencies of a transform of twice the frame


def contour(rng: Generator, samples: int, lowest: float, highest: float, kind: str) -> Signal:
    """The fundamental frequency of each sample.

    Args:
        rng: Source of random numbers.
        samples: Number of samples.
        lowest: Lower bound of the mean pitch in Hz.
        highest: Upper bound of the mean pitch in Hz.
        kind: ``"vibrato"`` (4 to 7 Hz, up to half a semitone), ``"glide"`` (up to an octave) or ``"speech"`` (slow
            accents of some semitones, with a fall).

    Returns:
        Frequencies in Hz.
    """
    time = np.arange(samples) / RATE
    mean = np.exp(rng.uniform(np.log(lowest), np.log(highest)))
    if kind == "vibrato":
        octaves = rng.uniform(0, 0.5 / 12) * np.sin(2 * np.pi * rng.uniform(4, 7) * time + rng.uniform(0, 6))
    elif kind == "glide":
        octaves = rng.uniform(-0.5, 0.5) * np.cos(np.pi * time / time[-1])
    else:
        waves = [
            rng.normal(0, 0.12) * np.sin(2 * np.pi * rng.uniform(0.3, 3) * time + rng.uniform(0, 6)) for _ in range(4)
        ]
        octaves = np.sum(waves, 0) + rng.uniform(0, 0.15) * (0.5 - time / time[-1])
    return np.clip(mean * 2**octaves, 35, 1900)


def tone(rng: Generator, pitch: Signal, timbre: str) -> Signal:
    """A sum of harmonics below 7.6 kHz.

    Args:
        rng: Source of random numbers.
        pitch: The fundamental of each sample in Hz.
        timbre: ``"random"`` amplitudes, ``"odd"`` harmonics mostly, as of a clarinet, or ``"plucked"``: a pulse wave
            whose high harmonics decay first.

    Returns:
        The samples.
    """
    phase, time = 2 * np.pi * np.cumsum(pitch) / RATE, np.arange(len(pitch)) / RATE
    count = int(min(24, 7600 // pitch.max()))
    order = np.arange(1, max(count, 1) + 1)
    decay = np.zeros(len(order))
    if timbre == "random":
        amplitudes = order ** -rng.uniform(0.3, 2) * np.exp(rng.normal(0, 0.7, len(order)))
    elif timbre == "odd":
        amplitudes = np.where(order % 2, 1, rng.uniform(0.05, 0.3)) / order
    else:
        amplitudes = abs(np.sin(np.pi * order * rng.uniform(0.1, 0.4))) / order + 0.02
        decay = rng.uniform(0.2, 1) * order**0.7
    shifts = rng.uniform(0, 2 * np.pi, len(order))
    return np.sum(
        [
            a * np.exp(-d * time) * np.cos(k * phase + s)
            for k, a, d, s in zip(order, amplitudes, decay, shifts, strict=True)
        ],
        0,
    )


def pulses(pitch: Signal, bandwidth: float) -> Signal:
    """Glottal pulses: all harmonics k f of equal phase with amplitude exp(-k f / bandwidth), in closed form.

    Args:
        pitch: The fundamental f of each sample in Hz.
        bandwidth: In Hz; at most 2,000, so that aliases are below -35 dB.

    Returns:
        The samples, of root mean square 1, without a constant part.
    """
    ratio, cosine = np.exp(-pitch / bandwidth), np.cos(2 * np.pi * np.cumsum(pitch) / RATE)
    series = (1 - ratio * cosine) / (1 - 2 * ratio * cosine + ratio**2) - 1
    return series / np.sqrt(ratio**2 / (1 - ratio**2) / 2)


def vowels(rng: Generator, pitch: Signal) -> Signal:
    """Glottal pulses through four resonances, which move once.

    Args:
        rng: Source of random numbers.
        pitch: The fundamental of each sample in Hz.

    Returns:
        The samples.
    """
    frequencies = np.linspace(0, RATE / 2, BINS)

    def resonances() -> NDArray[np.complex128]:
        response = np.ones(BINS, complex)
        for low, high in ((250, 850), (800, 2400), (2200, 3200), (3200, 4500)):
            centre, width = rng.uniform(low, high), rng.uniform(60, 200)
            response *= centre**2 / (centre**2 - frequencies**2 + 1j * frequencies * width)
        return response

    mix = np.linspace(0, 1, len(pitch) // HOP + 1)[:, None]
    response = np.exp((1 - mix) * np.log(resonances()) + mix * np.log(resonances()))
    return filtered(pulses(pitch, rng.uniform(800, 2000)) + breath(rng, len(pitch)), response)


def breath(rng: Generator, samples: int) -> Signal:
    """White noise of a level between -40 and -20 dB."""
    return rng.normal(0, 10 ** rng.uniform(-2, -1), samples)


def filtered(signal: Signal, response: NDArray[np.complex128]) -> Signal:
    """A filter that changes each HOP samples: overlapping frames, multiplied in the frequency domain.

    Args:
        signal: The samples.
        response: Frames x BINS; frame i is centred at sample i HOP.

    Returns:
        As many samples as ``signal`` has.
    """
    frames = np.fft.rfft(_frames(signal, len(response)), 2 * FRAME) * response
    out = np.zeros(len(response) * HOP + 2 * FRAME)
    for i, frame in enumerate(np.fft.irfft(frames)):
        out[i * HOP : i * HOP + 2 * FRAME] += frame
    return out[FRAME // 2 : FRAME // 2 + len(signal)] / 2


def _frames(signal: Signal, count: int) -> NDArray[np.float64]:
    """Frames centred at each HOP samples, by a Hann window."""
    padded = np.pad(signal, (FRAME // 2, FRAME + HOP))
    starts = np.arange(count)[:, None] * HOP
    return padded[np.minimum(starts + np.arange(FRAME), len(padded) - 1)] * np.hanning(FRAME + 1)[:FRAME]


def envelope(signal: Signal, quefrencies: int = 34) -> NDArray[np.complex128]:
    """The minimum-phase filter of each frame: its log spectrum, smoothed by the low part of its cepstrum.

    Args:
        signal: Speech.
        quefrencies: Number of cepstral coefficients; 34 are 2.1 ms, less than a period of any speaking voice.

    Returns:
        Frames x BINS, for ``filtered``.
    """
    spectrum = abs(np.fft.rfft(_frames(signal, len(signal) // HOP + 1), 2 * FRAME))
    cepstrum = np.fft.irfft(np.log(spectrum + 1e-4))[:, :quefrencies]
    cepstrum[:, 1:] *= 2  # its causal half alone: minimum phase
    return np.exp(np.fft.rfft(cepstrum, 2 * FRAME))


def espeak(voice: str, text: str, height: int = 50) -> Signal:
    """What espeak-ng says.

    Args:
        voice: A language and a variant, as ``"de+f2"``.
        text: The text. Digits are spoken in any language.
        height: Its pitch, 0 to 99.

    Returns:
        Samples at 16 kHz.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-p", str(height), "-w", str(path), text], check=True)
        with wave.open(str(path)) as file:
            rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15
    wanted = len(samples) * RATE // rate
    return np.fft.irfft(np.fft.rfft(samples)[: wanted // 2 + 1], wanted) * wanted / len(samples)


def revoiced(rng: Generator, speech: Signal, pitch: Signal) -> tuple[Signal, NDArray[np.bool_]]:
    """Speech with the pitch that is given.

    Args:
        rng: Source of random numbers.
        speech: The samples whose envelope is taken.
        pitch: The fundamental of each sample in Hz.

    Returns:
        The samples, and where they are voiced: where most energy of ``speech`` is below 1.5 kHz.
    """
    spectrum = abs(np.fft.rfft(_frames(speech, len(speech) // HOP + 1), 2 * FRAME)) ** 2
    low, total = spectrum[:, 4:96].sum(1), spectrum.sum(1)
    gate = ((low > 0.6 * total) & (total > 1e-3 * total.max())).astype(float)
    gate = np.interp(np.arange(len(speech)), np.arange(len(gate)) * HOP, gate)
    source = gate * pulses(pitch, rng.uniform(1200, 2000)) + (1 - gate) * 0.5 * rng.normal(size=len(speech))
    return filtered(source + breath(rng, len(speech)), envelope(speech)), gate == 1


def noise(rng: Generator, samples: int, kind: str, voices: list[Signal]) -> Signal:
    """Noise to be added.

    Args:
        rng: Source of random numbers.
        samples: Number of samples.
        kind: ``"white"``, ``"pink"``, ``"brown"``, ``"wind"`` (brown in gusts), ``"motor"`` (a band that wobbles),
            ``"rain"`` (filtered clicks) or ``"babble"`` (six voices at once).
        voices: Speech for babble.

    Returns:
        The samples, of root mean square 1.
    """
    white = rng.normal(size=samples)
    frequencies = np.fft.rfftfreq(samples, 1 / RATE) + 20
    time = np.arange(samples) / RATE

    def shaped(signal: Signal, gain: NDArray[np.float64]) -> Signal:
        return np.fft.irfft(np.fft.rfft(signal) * gain, samples)

    if kind == "babble":
        chosen = [
            np.resize(np.roll(v, rng.integers(len(v))), samples)
            for v in (voices[i] for i in rng.integers(len(voices), size=6))
        ]
        sound = np.sum([v / v.std() for v in chosen], 0)
    elif kind == "rain":
        clicks = np.where(rng.random(samples) < 0.004, rng.exponential(size=samples) * rng.choice([-1, 1], samples), 0)
        sound = shaped(clicks, 1 / (1 + ((frequencies - 3000) / 1500) ** 2)) + 0.02 * white
    elif kind == "wind":
        gusts = np.exp(0.8 * np.sin(2 * np.pi * 0.7 * time) + 0.6 * np.sin(2 * np.pi * 0.31 * time + 1))
        sound = shaped(white, 1 / frequencies) * gusts
    elif kind == "motor":
        band = shaped(white, np.exp(-(((frequencies - 500) / 300) ** 2)) + 0.05)
        sound = band * (1 + 0.6 * np.sin(2 * np.pi * 13 * time))
    else:
        sound = shaped(white, frequencies ** -{"white": 0, "pink": 0.5, "brown": 1.0}[kind])
    return sound / sound.std()
