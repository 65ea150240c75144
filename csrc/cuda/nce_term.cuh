// The NCE term of one score with the device's exp and log1p; cpu/fast_math.h has the one for the CPU.
#pragma once

#include "bank_nce.h"

namespace sslfast {

template <typename A>
__device__ __forceinline__ NceTerm<A> nce_term(A u) {
  const A e = exp(u > A(0) ? -u : u);
  return NceTerm<A>(u, e, log1p(e));
}

}  // namespace sslfast
