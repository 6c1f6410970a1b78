// The scalars of one dispatch; the including file declares `Params`, of 4-byte scalars only.

#if IMMEDIATES
var<immediate> params: Params;
#else
@group(1) @binding(0) var<uniform> params: Params;
#endif
