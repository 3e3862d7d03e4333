"""Log-mel features of speech: 40 numbers every 10 ms, by arithmetic that a few lines of C repeat.

In float32, for samples between -1 and 1 at 16 kHz:

1. A frame is 400 samples (25 ms); frames begin every 160 samples (10 ms). There is no padding: n samples have
   1 + (n - 400) // 160 frames.
2. Its samples are multiplied by the Hann window .5 - .5 cos(2 pi i / 400), and zeros are appended up to 512 samples.
3. The power of bin k = 0..256 is the squared absolute value of the discrete Fourier transform.
4. Band b is the sum of the powers times a triangle. The 42 corners are evenly spaced in mel from 20 Hz to 8 kHz,
   mel(f) = 2595 log10(1 + f / 700); triangle b rises linearly in f from 0 at corner b to 1 at corner b + 1, and falls
   to 0 at corner b + 2. Bin k is at 31.25 k Hz.
5. The feature is log(band + 1e-6), the natural logarithm.

Nothing is normalised: the networks' first layer does that.
"""

import numpy as np
from jaxtyping import Float32

from deepthin.errors import ConfigError

RATE = 16_000  # samples per second
WINDOW, HOP, FFT = 400, 160, 512  # samples
BANDS = 40
LOWEST, HIGHEST = 20.0, 8_000.0  # Hz
FLOOR = 1e-6  # added to the power of a band


def window() -> Float32[np.ndarray, "window"]:
    """The Hann window, periodic in its length.

    Returns:
        A factor for each sample of a frame.
    """
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


def triangles() -> Float32[np.ndarray, "bands bins"]:
    """The weight of each bin of the spectrum in each band.

    Returns:
        Triangles with peak 1, evenly spaced in mel.
    """
    lowest, highest = (2595 * np.log10(1 + frequency / 700) for frequency in (LOWEST, HIGHEST))
    corners = 700 * (10 ** (np.linspace(lowest, highest, BANDS + 2) / 2595) - 1)  # Hz
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    frequency = np.arange(FFT // 2 + 1) * (RATE / FFT)
    rising, falling = (frequency - low) / (peak - low), (high - frequency) / (high - peak)
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


_WINDOW, _TRIANGLES = window(), triangles()


def log_mel(samples: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "frames bands"]:
    """Compute the features of a recording.

    Args:
        samples: At 16 kHz, between -1 and 1; at least one frame, 400 samples.

    Returns:
        40 features for each frame.

    Raises:
        ConfigError: The recording is shorter than a frame.
    """
    if len(samples) < WINDOW:
        raise ConfigError(f"A recording of {len(samples)} samples is shorter than one frame: it needs {WINDOW}.")
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float32), WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * _WINDOW, FFT)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    return np.log(power @ _TRIANGLES.T + np.float32(FLOOR))


def resampled(samples: Float32[np.ndarray, "samples"], rate: int) -> Float32[np.ndarray, "_"]:
    """Bring a recording to 16 kHz by its spectrum: frequencies above the lower of both Nyquist limits are cut off.

    Args:
        samples: The recording.
        rate: Its samples per second, > 0.

    Returns:
        The recording with 16,000 samples per second.
    """
    count = round(len(samples) * RATE / rate)
    if rate == RATE or count == 0:
        return samples
    spectrum = np.fft.rfft(samples.astype(np.float64))[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)
