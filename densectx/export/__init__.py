"""Models as files that answer without densectx: ONNX, torch.export, AOTInductor; and as plain weights."""
