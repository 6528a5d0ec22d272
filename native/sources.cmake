# The native library: portable files once, the files in isa/ once for each instruction set.
# Each instruction set gets its own namespace (lowbit::scalar, lowbit::avx2, ...) through LOWBIT_ISA,
# so one binary holds them all and native/dispatch.cc picks at start.

set(LOWBIT_NATIVE_DIR ${CMAKE_CURRENT_LIST_DIR})
file(GLOB LOWBIT_PORTABLE CONFIGURE_DEPENDS ${LOWBIT_NATIVE_DIR}/*.cc)
file(GLOB LOWBIT_BINDINGS CONFIGURE_DEPENDS ${LOWBIT_NATIVE_DIR}/bind*.cc)
list(REMOVE_ITEM LOWBIT_PORTABLE ${LOWBIT_BINDINGS})
file(GLOB LOWBIT_ISA_SOURCES CONFIGURE_DEPENDS ${LOWBIT_NATIVE_DIR}/isa/*.cc)

# No fast-math anywhere, and no silent contraction: where a fused multiply-add is meant, the code says
# fma(), so that every instruction set rounds alike.
# GCC 12 warns inside its own AVX-512 headers about _mm512_undefined (its bug 105593), so that warning is off.
set(LOWBIT_FLAGS -O3 -Wall -Wextra -fno-math-errno -ffp-contract=off -fvisibility=hidden)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND LOWBIT_FLAGS -Wno-maybe-uninitialized -Wno-uninitialized)
endif()

add_library(lowbit_native STATIC ${LOWBIT_PORTABLE})
target_include_directories(lowbit_native PUBLIC ${LOWBIT_NATIVE_DIR})
target_compile_options(lowbit_native PRIVATE ${LOWBIT_FLAGS})

function(lowbit_add_isa name)
  add_library(lowbit_${name} OBJECT ${LOWBIT_ISA_SOURCES})
  target_include_directories(lowbit_${name} PRIVATE ${LOWBIT_NATIVE_DIR})
  target_compile_definitions(lowbit_${name} PRIVATE LOWBIT_ISA=${name} LOWBIT_ISA_${name}=1)
  target_compile_options(lowbit_${name} PRIVATE ${LOWBIT_FLAGS} ${ARGN})
  target_sources(lowbit_native PRIVATE $<TARGET_OBJECTS:lowbit_${name}>)
  target_compile_definitions(lowbit_native PRIVATE LOWBIT_HAVE_${name}=1)
endfunction()

lowbit_add_isa(scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  lowbit_add_isa(avx2 -mavx2 -mfma -mf16c)
  lowbit_add_isa(avxvnni -mavx2 -mfma -mf16c -mavxvnni)
  lowbit_add_isa(avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
                 -mavx512vbmi -mavx512vbmi2 -mgfni -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  lowbit_add_isa(neon -march=armv8-a)
  lowbit_add_isa(neondot -march=armv8.2-a+dotprod)
endif()
