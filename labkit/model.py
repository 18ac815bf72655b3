"""The CNN, built twice on one set of weights: once on the queue, once on placeholders.

`tf.nn` and `get_variable` do what `tf.compat.v1.layers` did before Keras 3 took it away. Keras
layers would not do here: each call of a constructor makes new variables, whatever the scope says.
"""

from typing import Any

import numpy as np

from labkit.quiet import tf

v1 = tf.compat.v1
_FILTERS = (4, 8, 8, 8)
_MOMENTUM = 0.9
_EPSILON = 1e-3


def build_model(images: Any, is_train: bool) -> Any:
    """The article's network: conv 4, pool, conv 8, pool, conv 8, conv 8, pool, dense 64, dense 10.

    Each convolution is 3x3 with batch normalisation and ReLU; each pool takes the maximum of 2x2.

    Args:
        images: float `[batch, height, width, channels]`, of known height, width and channels.
        is_train: normalise with the batch's own moments and update the moving averages
            (in the collection UPDATE_OPS), or use the moving averages.

    Returns:
        Logits, float32 `[batch, 10]`.

    Raises:
        ValueError: images are not of rank 4.
    """
    if images.shape.rank != 4:
        raise ValueError(
            f"build_model: expected images [batch, height, width, channels], got shape "
            f"{images.shape}. Add the missing axis, as in images[..., tf.newaxis]."
        )
    x = images
    for index, filters in enumerate(_FILTERS, start=1):
        x = _conv_norm_relu(x, filters, is_train, f"conv{index}")
        if index != 3:
            x = tf.nn.max_pool2d(x, 2, 2, "SAME")
    x = tf.reshape(x, [-1, int(np.prod(x.shape[1:]))])
    x = tf.nn.relu(_dense(x, 64, "dense1"))
    return _dense(x, 10, "dense2")


def _conv_norm_relu(x: Any, filters: int, is_train: bool, name: str) -> Any:
    with v1.variable_scope(name):
        kernel = _variable("kernel", [3, 3, int(x.shape[-1]), filters], "glorot_uniform")
        x = tf.nn.conv2d(x, kernel, strides=1, padding="SAME")
        gamma, beta = _variable("gamma", [filters], "ones"), _variable("beta", [filters], "zeros")
        mean = _variable("moving_mean", [filters], "zeros", trainable=False)
        variance = _variable("moving_variance", [filters], "ones", trainable=False)
        if is_train:
            x, batch_mean, batch_variance = v1.nn.fused_batch_norm(
                x, gamma, beta, epsilon=_EPSILON, is_training=True
            )
            for average, now in ((mean, batch_mean), (variance, batch_variance)):
                update = average.assign_sub((1 - _MOMENTUM) * (average - now), read_value=False)
                v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
        else:
            x, _, _ = v1.nn.fused_batch_norm(
                x, gamma, beta, mean, variance, epsilon=_EPSILON, is_training=False
            )
        return tf.nn.relu(x)


def _dense(x: Any, units: int, name: str) -> Any:
    with v1.variable_scope(name):
        kernel = _variable("kernel", [int(x.shape[-1]), units], "glorot_uniform")
        return tf.matmul(x, kernel) + _variable("bias", [units], "zeros")


def _variable(name: str, shape: list[int], start: str, trainable: bool = True) -> Any:
    make = getattr(v1, f"{start}_initializer")
    return v1.get_variable(name, shape, tf.float32, make(), trainable=trainable)


def model_fn(
    inputs: dict[str, Any],
    reuse: bool = False,
    is_train: bool = True,
    learning_rate: float = 1e-4,
) -> dict[str, Any]:
    """The model with its loss, accuracy, summaries and, in training, its training op.

    Args:
        inputs: `images` float32 `[batch, height, width, channels]` and `labels` one-hot float32
            `[batch, 10]`. Left as it is.
        reuse: take the variables that an earlier call made, in place of making new ones.
        is_train: build the training op; batch normalisation in training mode.
        learning_rate: of Adam (Kingma and Ba, 2015). Default 1e-4.

    Returns:
        A new dict: `logits` and `softmax` `[batch, 10]`; `loss`, the mean cross-entropy per sample
        in nats; `accuracy` 0..1; `summary_op`, the summaries of this call alone; `train_op` if
        is_train.

    Raises:
        KeyError: inputs lack images or labels.
        ValueError: reuse=True before any variable exists, or reuse=False after.
    """
    missing = {"images", "labels"} - set(inputs)
    if missing:
        raise KeyError(
            f"model_fn: expected inputs with the keys 'images' and 'labels', got {sorted(inputs)}; "
            f"missing {sorted(missing)}."
        )
    images, labels = inputs["images"], inputs["labels"]
    with v1.variable_scope("model", reuse=reuse):
        known = len(v1.get_collection(v1.GraphKeys.UPDATE_OPS))
        logits = build_model(images, is_train)
        # Taken from the logits: log(softmax) is -inf for one confident mistake, and then NaN.
        losses = tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        loss = tf.reduce_mean(losses)
        right = tf.equal(tf.argmax(logits, 1), tf.argmax(labels, 1))
        accuracy = tf.reduce_mean(tf.cast(right, tf.float32))
        spec = {
            "logits": logits,
            "softmax": tf.nn.softmax(logits),
            "loss": loss,
            "accuracy": accuracy,
        }
        # Merged by name: merge_all would bring in the other graph's summaries, and running those
        # in validation would take a batch off the training queue.
        spec["summary_op"] = v1.summary.merge(
            [v1.summary.scalar("loss", loss), v1.summary.scalar("accuracy", accuracy)]
        )
        if is_train:
            updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)[known:]
            with tf.control_dependencies(updates):
                spec["train_op"] = v1.train.AdamOptimizer(learning_rate).minimize(
                    loss, global_step=v1.train.get_or_create_global_step()
                )
    return spec
