"""A trained-model folder of nnU-Net whose network has random weights: `PYTHON random_model.py FOLDER`.

Run by the Python of an environment that has nnU-Net, not by ours. The network says nothing about anything: with it the
mechanism is tried (the real program, its files, its exit code), never a result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

LABELS = {"background": 0, "L1": 1, "L2": 2, "sacrum": 3}
NETWORK: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
CLASS = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
SPACING = [3.0, 3.0, 3.0]


def write(folder: Path) -> None:
    """dataset.json, plans.json and fold_0/checkpoint_final.pth."""
    torch.manual_seed(1)
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "random",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": [32, 32, 32],
        "median_image_size_in_voxels": [64.0, 64.0, 64.0],
        "spacing": SPACING,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {"network_class_name": CLASS, "arch_kwargs": NETWORK, "_kw_requires_import": IMPORTED},
        "batch_dice": False,
    }
    statistics = {
        "max": 3000.0, "mean": 50.0, "median": 40.0, "min": -1000.0,
        "percentile_00_5": -900.0, "percentile_99_5": 1200.0, "std": 300.0,
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset999_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": SPACING,
        "original_median_shape_after_transp": [64, 64, 64],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistics},
    }
    dataset = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"}
    network = get_network_from_plans(CLASS, NETWORK, IMPORTED, 1, len(LABELS), deep_supervision=False)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0, "plans": plans, "dataset_json": dataset},
        "inference_allowed_mirroring_axes": None,
    }
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1))
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
