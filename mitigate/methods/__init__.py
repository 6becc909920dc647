"""Built-in methods: registered name -> ``module:Class`` (the one line to add for a new built-in method)."""

BUILTIN = {
    "locore": "mitigate.methods.locore:LocoRE",
    "scr": "mitigate.methods.scr:SCR",
    "sgrs": "mitigate.methods.sgrs:SGRS",
    "clva": "mitigate.methods.clva:CLVA",
    "dleaf": "mitigate.methods.dleaf:DLEAF",
    "control_probe": "mitigate.methods.control_probe:ControlProbe",
    "control_random": "mitigate.methods.control_random:ControlRandom",
}
