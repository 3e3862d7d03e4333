"""An LSTM in Keras, saved thin, and the same network in torch from the same file."""

import sys

import keras
import numpy as np

import deepthin.keras as dk

STEPS, FEATURES, CLASSES = 20, 16, 4


def sequences(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic data: noise in which one of a few features is larger at the start. Replace it by your sequences."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    x = rng.normal(size=(count, STEPS, FEATURES))
    x[np.arange(count), :5, classes] += 1.5
    return x.astype("float32"), classes


def build(units: int) -> keras.Model:
    """One recurrent layer and one dense layer."""
    return keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            keras.layers.LSTM(units, name="lstm"),
            keras.layers.Dense(CLASSES, name="output"),
        ]
    )


NAMES = {  # Keras' name, in the file: torch's name. The file has torch's layouts already
    "lstm.lstm_cell.kernel": "lstm.weight_ih_l0",
    "lstm.lstm_cell.recurrent_kernel": "lstm.weight_hh_l0",
    "lstm.lstm_cell.bias": "lstm.bias_ih_l0",  # bias_hh_l0 is then zero
    "output.kernel": "output.weight",
    "output.bias": "output.bias",
}


def in_torch(path: str, units: int, x: np.ndarray) -> np.ndarray:
    """The outputs of the same network, built in torch and loaded from the file."""
    import torch
    from torch import nn

    import deepthin.torch as dt

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.output = nn.LSTM(FEATURES, units, batch_first=True), nn.Linear(units, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.lstm(x)[0][:, -1])

    net = dt.load(Net(), path, names=NAMES).eval()
    with torch.no_grad():
        return net(torch.from_numpy(x)).numpy()


def main(path: str = "lstm.thin", units: int = 64, epochs: int = 6) -> tuple[float, float]:
    """Return the accuracy, and the largest difference between Keras' and torch's outputs."""
    keras.utils.set_random_seed(0)
    model = build(units)
    print(dk.compress(model, {"rules": {"lstm": {"method": "deepthin", "ratio": 0.1}}}, init="scratch"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(dk.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(*sequences(1000), epochs=epochs, verbose=0)
    print(f"{dk.save(model, path):,} bytes")

    x, classes = sequences(200, seed=2)
    scores = keras.ops.convert_to_numpy(model(x))
    right, far = float((scores.argmax(1) == classes).mean()), float(np.abs(scores - in_torch(path, units, x)).max())
    print(f"{100 * right:.1f} % of sequences are right; torch's scores differ by at most {far:.1e}")
    return right, far


if __name__ == "__main__":
    main(*sys.argv[1:2])
