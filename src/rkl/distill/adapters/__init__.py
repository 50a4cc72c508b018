"""The losses of rkl in the form of other trainers, each of which is imported only when asked for.

=================================  =================================================
:mod:`rkl.distill.adapters.trl`    a mixin for GKDTrainer and DistillationTrainer
:mod:`~.automodel`                 ``KDLoss`` for NeMo Automodel
:mod:`~.kdflow`                    ``register``: losses by ``--kd_loss_fn``
:mod:`~.verl`                      ``register``: losses by ``loss_mode``
:mod:`~.axolotl`                   a plugin
=================================  =================================================
"""
