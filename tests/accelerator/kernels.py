"""Operations that torch asks of other devices than the CPU, computed on the CPU.

A recurrent layer takes each step by one fused operation there. As on CUDA, it has a derivative, and one of that, but no
forward-mode derivative.
"""

from __future__ import annotations

import torch


def _lstm_cell(input_gates, hidden_gates, cell, input_bias=None, hidden_bias=None):
    """Return the next hidden state, the next cell, and the gates."""
    gates = input_gates + hidden_gates
    if input_bias is not None:
        gates = gates + input_bias + hidden_bias
    enter, forget, new, leave = gates.chunk(4, 1)
    activated = torch.cat([enter.sigmoid(), forget.sigmoid(), new.tanh(), leave.sigmoid()], 1)
    enter, forget, new, leave = activated.chunk(4, 1)
    next_cell = forget * cell + enter * new
    return leave * next_cell.tanh(), next_cell, activated


def _lstm_cell_backward(grad_hidden, grad_cell, cell, next_cell, activated, has_bias):
    """Return the gradients of the gates, of the cell, and of each bias."""
    enter, forget, new, leave = activated.chunk(4, 1)
    bounded = next_cell.tanh()
    grad_next = torch.zeros_like(cell) if grad_cell is None else grad_cell
    grad_leave = torch.zeros_like(leave)
    if grad_hidden is not None:
        grad_next = grad_next + grad_hidden * leave * (1 - bounded.square())
        grad_leave = grad_hidden * bounded * leave * (1 - leave)
    grads = [grad_next * new * enter * (1 - enter), grad_next * cell * forget * (1 - forget)]
    grad_gates = torch.cat([*grads, grad_next * enter * (1 - new.square()), grad_leave], 1)
    return grad_gates, grad_next * forget, grad_gates.sum(0) if has_bias else None


def _gru_cell(input_gates, hidden_gates, hidden, input_bias=None, hidden_bias=None):
    """Return the next hidden state, and what its derivative needs."""
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    of_input, of_hidden = input_gates.chunk(3, 1), hidden_gates.chunk(3, 1)
    reset, update = ((of_input[number] + of_hidden[number]).sigmoid() for number in range(2))
    new = (of_input[2] + reset * of_hidden[2]).tanh()
    return new + update * (hidden - new), torch.cat([reset, update, new, hidden, of_hidden[2]], 1)


def _gru_cell_backward(grad, kept, has_bias):
    """Return the gradients of the gates of both kinds, of the hidden state, and of both biases."""
    reset, update, new, hidden, of_hidden = kept.chunk(5, 1)
    grad_new = grad * (1 - update) * (1 - new.square())
    grad_update = grad * (hidden - new) * update * (1 - update)
    grad_reset = grad_new * of_hidden * reset * (1 - reset)
    grad_input = torch.cat([grad_reset, grad_update, grad_new], 1)
    grad_hidden = torch.cat([grad_reset, grad_update, grad_new * reset], 1)
    sums = (grad_input.sum(0), grad_hidden.sum(0)) if has_bias else (None, None)
    return grad_input, grad_hidden, grad * update, *sums


KERNELS = {
    "aten::_efficientzerotensor": torch.ops.aten.zeros.default,  # dual numbers use zeros that have no memory
    "aten::_thnn_fused_gru_cell": _gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "aten::_thnn_fused_lstm_cell": _lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
}
"""What is called instead of an operation, with tensors of the CPU."""
