"""Whether the device may work while nobody asks."""

from edge_rag.records import Power


def why_wait(power: Power, *, max_celsius: float, on_battery: bool) -> str:
    """Why nothing is learned now, in words; '' when nothing speaks against it.

    `max_celsius` and `on_battery` (whether that is allowed) are the settings'.
    """
    if power.on_battery and not on_battery:
        return "the device runs on battery (learning.on_battery)"
    if power.celsius is not None and power.celsius > max_celsius:
        return f"the device has {power.celsius:.0f} °C, more than {max_celsius:.0f} (learning.max_celsius)"
    return ""
