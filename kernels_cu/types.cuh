// types.cuh: integer names, storage types of elements and their traits.
//
// Storage types hold bits; arithmetic is done in float.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;
#define INF __uint_as_float(0x7f800000u)

struct f16 { u16 bits; };
struct bf16 { u16 bits; };
struct e4m3 { u8 bits; };  // OCP FP8: no infinities, NaN is 0x7f and 0xff, largest 448
struct e5m2 { u8 bits; };  // OCP FP8: the upper byte of an f16, largest finite 57344
struct i4 { u8 bits; };    // two int4 in two's complement, the even element in the lower half

// Largest magnitude of a quantized kind's codes; 0 for kinds that hold floats.
template <typename T> constexpr float LARGEST = 0.0f;
template <> constexpr float LARGEST<i8> = 127.0f;
template <> constexpr float LARGEST<i4> = 7.0f;
template <> constexpr float LARGEST<e4m3> = 448.0f;
template <> constexpr float LARGEST<e5m2> = 57344.0f;

template <typename T> constexpr int PACKED = 1;  // elements of one T
template <> constexpr int PACKED<i4> = 2;

template <typename T> constexpr bool IS_FP8 = false;
template <> constexpr bool IS_FP8<e4m3> = true;
template <> constexpr bool IS_FP8<e5m2> = true;

template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

template <typename T, typename U> constexpr bool SAME = false;
template <typename T> constexpr bool SAME<T, T> = true;
