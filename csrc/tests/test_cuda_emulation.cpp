// What the emulation of CUDA finds: races in shared memory, lanes that meet at different operations, memory that is
// read before it is written, and lanes that rely on an order.
#include "cuda_emulation.h"
// The emulation comes first: it says what the kernels' words mean here.
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "check.h"

namespace {

enum class Barrier { none, warp, block };

void meet_at(Barrier barrier) {
  if (barrier == Barrier::warp) __syncwarp();
  if (barrier == Barrier::block) __syncthreads();
}

/// Runs a block of 64 threads and returns what it did wrong.
template <class Body>
std::string fault_of(Body const& body) {
  emulation::fault.clear();
  emulation::launch(1, 64, 64, body);
  return std::exchange(emulation::fault, {});
}

/// Each lane writes its element and reads that of the lane `distance` away.
std::string fault_of_neighbours(unsigned distance, Barrier barrier) {
  return fault_of([=] {
    FASTMTL_DYNAMIC_SHARED(double, elements);
    elements[threadIdx.x] = threadIdx.x;
    meet_at(barrier);
    double const other = elements[threadIdx.x ^ distance];
    if (barrier != Barrier::none) check(other == (threadIdx.x ^ distance), "what another lane wrote before a barrier");
  });
}

void test_read_after_write() {
  for (unsigned const distance : {1u, 31u, 32u, 63u}) {
    bool const leaves_warp = distance >= 32;
    std::string const what = " at distance " + std::to_string(distance);
    check(fault_of_neighbours(distance, Barrier::none).find("since the last barrier") != std::string::npos,
          "race" + what);
    check(fault_of_neighbours(distance, Barrier::warp).empty() == !leaves_warp, "barrier of the warp" + what);
    check(fault_of_neighbours(distance, Barrier::block).empty(), "barrier of the block" + what);
  }
  check(fault_of_neighbours(0, Barrier::none).empty(), "a lane's own element");
}

void test_write_after_read() {
  for (Barrier const barrier : {Barrier::none, Barrier::warp, Barrier::block}) {
    std::string const fault = fault_of([=] {
      __shared__ float turned[64];
      turned[threadIdx.x] = 1;
      __syncthreads();
      float const other = turned[63 - threadIdx.x];
      meet_at(barrier);
      turned[threadIdx.x] = other;
    });
    check(fault.empty() == (barrier == Barrier::block), "write after read");
  }
}

void test_writes_of_many() {
  auto const fault = [](unsigned lanes, Barrier barrier) {
    return fault_of([=] {
      FASTMTL_DYNAMIC_SHARED(uint16_t, elements);
      if (threadIdx.x < lanes) elements[1] = 7;
      meet_at(barrier);
      if (threadIdx.x == 1) elements[1] = 8;
    });
  };
  check(!fault(2, Barrier::warp).empty(), "two lanes write one element");
  check(!fault(1, Barrier::none).empty(), "two lanes write one after the other");
  check(fault(1, Barrier::warp).empty(), "two lanes write with a barrier between");
}

/// Words of 16 bytes are written by some instructions; neighbours are not the same memory.
void test_widths() {
  auto const fault = [](unsigned shift) {
    return fault_of([=] {
      __shared__ uint4 words[64];
      words[threadIdx.x] = {threadIdx.x, 0, 0, 0};
      auto const* const elements = reinterpret_cast<uint16_t const*>(words);
      check(elements[8 * ((threadIdx.x + shift) % 64) + 7] == 0 || shift != 0, "a lane's own word");
    });
  };
  check(fault(0).empty(), "own words");
  check(!fault(1).empty(), "a part of another lane's word");
}

/// A shuffle exchanges registers; it orders no memory.
void test_shuffles_order_nothing() {
  std::string const fault = fault_of([] {
    FASTMTL_DYNAMIC_SHARED(double, elements);
    elements[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0, 1);
    __shfl_xor_sync(0xffffffffu, elements[threadIdx.x ^ 1], 1);
  });
  check(!fault.empty(), "a shuffle is no barrier");
}

void test_meetings() {
  std::string const fault = fault_of([] {
    if (threadIdx.x % 2 == 0) {
      __syncwarp();
      __syncwarp();
    } else {
      __shfl_sync(0xffffffffu, 1, 0);
    }
  });
  check(fault.find("__syncwarp") != std::string::npos && fault.find("__shfl_sync") != std::string::npos,
        "lanes of a warp at different operations: " + fault);
}

/// Neither kind of shared memory is a number before it is written, in any block.
void test_poison() {
  int numbers = 0;
  emulation::launch(3, 32, 32, [&] {
    FASTMTL_DYNAMIC_SHARED(double, dynamic);
    __shared__ float fixed[32];
    numbers += !std::isnan(dynamic[threadIdx.x]) + !std::isnan(fixed[threadIdx.x]);
    dynamic[threadIdx.x] = fixed[threadIdx.x] = 1;
  });
  check(numbers == 0 && emulation::fault.empty(), "shared memory that was not written");
}

void test_dynamic_memory_has_an_end() {
  auto const fault = [](unsigned past) {
    return fault_of([=] {
      FASTMTL_DYNAMIC_SHARED(double, elements);
      elements[threadIdx.x + past] = 1;
    });
  };
  check(fault(0).empty(), "all of dynamic shared memory");
  check(fault(1).find("has not asked for") != std::string::npos, "beyond dynamic shared memory");
}

void test_orders() {
  std::set<std::vector<unsigned>> orders;
  emulation::launch(4, 32, 0, [&] {
    static std::vector<unsigned> order;
    order.push_back(threadIdx.x);
    if (order.size() == 32) orders.insert(std::exchange(order, {}));
  });
  check(orders.size() == 4, "lanes go on in another order each time");
  for (std::vector<unsigned> const& order : orders) {
    check(std::set<unsigned>(order.begin(), order.end()).size() == 32, "each lane once");
  }
}

}  // namespace

int main() {
  test_read_after_write();
  test_write_after_read();
  test_writes_of_many();
  test_widths();
  test_shuffles_order_nothing();
  test_meetings();
  test_poison();
  test_dynamic_memory_has_an_end();
  test_orders();
  return finish("cuda_emulation");
}
