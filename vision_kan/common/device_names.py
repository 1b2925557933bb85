"""Names of devices for --device, checked without torch."""
import re

DEVICE_NAME = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
NOT_A_DEVICE = "is not a device: use auto, cpu, cuda, cuda:N or mps"
