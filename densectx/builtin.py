"""densectx's own parts: name -> where it is defined, resolved when it is used."""

from __future__ import annotations

BUILTIN: dict[str, dict[str, str]] = {
    "backbones": {
        "dilated_resnet18": "densectx.backbones.timm:dilated_resnet18",
        "dilated_resnet34": "densectx.backbones.timm:dilated_resnet34",
        "dilated_resnet50": "densectx.backbones.timm:dilated_resnet50",
        "dilated_resnet101": "densectx.backbones.timm:dilated_resnet101",
        "dilated_vgg16": "densectx.backbones.vgg:DilatedVGG16",
        "frontend_vgg16": "densectx.backbones.frontend:FrontEndVGG16",
        "plain": "densectx.backbones.plain:Plain",
        "timm": "densectx.backbones.timm:Timm",
    },
    "contexts": {
        "aspp": "densectx.nn.aspp:ASPP",
        "basic": "densectx.nn.context:basic",
        "context7": "densectx.nn.context:context7",
        "context10": "densectx.nn.context:context10",
        "large": "densectx.nn.context:large",
        "none": "densectx.nn.context:NoContext",
    },
    "heads": {
        "decoder": "densectx.heads.decoder:Decoder",
        "linear": "densectx.heads.linear:Linear",
        "upsample": "densectx.heads.linear:Upsample",
    },
    "tasks": {
        "colorization": "densectx.tasks.colorization:Colorization",
        "demosaicing": "densectx.tasks.demosaicing:Demosaicing",
        "denoising": "densectx.tasks.denoising:Denoising",
        "jpeg_deblocking": "densectx.tasks.jpeg_deblocking:JpegDeblocking",
        "regression": "densectx.tasks.regression:Regression",
        "restoration": "densectx.tasks.restoration:Restoration",
        "segmentation": "densectx.tasks.segmentation:Segmentation",
        "super_resolution": "densectx.tasks.super_resolution:SuperResolution",
    },
    "datasets": {
        "concat": "densectx.data.concat:Concat",
        "folder": "densectx.data.folder:Folder",
        "image_mask": "densectx.data.image_mask:ImageMask",
        "manifest": "densectx.data.manifest:Manifest",
        "mosaic": "densectx.data.mosaic:Mosaic",
        "paired": "densectx.data.paired:Paired",
    },
    "losses": {
        "bce": "densectx.losses.classes:BCE",
        "charbonnier": "densectx.losses.elementwise:Charbonnier",
        "cross_entropy": "densectx.losses.classes:CrossEntropy",
        "dice": "densectx.losses.region:Dice",
        "focal": "densectx.losses.classes:Focal",
        "l1": "densectx.losses.elementwise:L1",
        "lovasz": "densectx.losses.lovasz:Lovasz",
        "mse": "densectx.losses.elementwise:MSE",
        "ssim": "densectx.losses.ssim:SSIM",
        "tversky": "densectx.losses.region:Tversky",
    },
    "models": {
        "dilation7_kitti": "densectx.published.dilation:dilation7_kitti",
        "dilation8_camvid": "densectx.published.dilation:dilation8_camvid",
        "dilation8_pascal_voc": "densectx.published.dilation:dilation8_pascal_voc",
        "dilation10_cityscapes": "densectx.published.dilation:dilation10_cityscapes",
        "frontend_vgg16": "densectx.published.dilation:frontend_vgg16",
    },
}
