-- What `bank.py` and `gcra.py` do, for the limits of one tenant and by the clock of Redis.
--
-- KEYS: the operation, then every limit of the exchange, once.
-- ARGV: the replica; lease_s; then three blobs of little-endian doubles:
--   of each limit   kind, burst, interval_s
--   of each return  limit, units, mark
--   of each draw    number of lines, then of each line: limit, need, want, hint (NaN: none)
-- The reply is one blob of doubles: now in microseconds; then of each draw the line that was
-- refused (-1: none) and wait_s, and of each line units, free, mark. Limits and lines count from 0.

local RATE, LEVEL, MONTH = 0, 1, 2
local EPSILON = 1e-6         -- sums of floats: a unit has no parts
local EPSILON_S = 5e-7       -- a wait below half of what the clock resolves is none
local EXTRA_SHARE = 0.25     -- as in bank.py
local PHANTOM_S = 1          -- as in bank.py
local EPOCH_S = 1767225600   -- marks count from 2026, else a double would hold them to 0.2 us only
local RATE_KEEP_S = 3600     -- a rate that is full again is kept for late returns: deadline_s_max
local MONTH_KEEP_S = 3456000 -- 40 days

local replica, lease_s = ARGV[1], tonumber(ARGV[2])
local said = redis.call('GET', KEYS[1])
if said then return said end
local time = redis.call('TIME')
local now = time[1] * 1e6 + time[2] -- microseconds: exact in a double until 2255

local kinds = {}

-- A rate is {at, debt, back, interval}: at `at` it owed `debt` seconds; `tat` is at + debt.
local function debt(state)
  return math.max(state.debt - (now - state.at) / 1e6, 0)
end

kinds[RATE] = {
  new = function(limit)
    return {at = now, debt = 0, back = 0, interval = limit.interval}
  end,
  load = function(limit, state) -- the same units used, should the rate have changed
    if state.interval ~= limit.interval then
      local owed = debt(state)
      state.back = state.back + owed
      state.at, state.debt = now, owed / state.interval * limit.interval
      state.interval = limit.interval
    end
  end,
  free = function(limit, state) return limit.burst - debt(state) / limit.interval end,
  wait = function(limit, state, units)
    if units > limit.burst then return math.huge end
    local wait = debt(state) + (units - limit.burst) * limit.interval
    return wait > EPSILON_S and wait or 0
  end,
  charge = function(limit, state, units)
    state.at, state.debt = now, debt(state) + units * limit.interval
    return now / 1e6 - EPOCH_S + state.debt + state.back
  end,
  give_back = function(limit, state, units, mark)
    if units < 0 then
      kinds[RATE].charge(limit, state, -units)
    else
      local unfilled = math.max(mark - (state.at / 1e6 - EPOCH_S) - state.back, 0)
      local back = math.min(units * limit.interval, unfilled)
      state.debt, state.back = state.debt - back, state.back + back
    end
  end,
  lower = function(limit, state, free)
    local owed = (limit.burst - free) * limit.interval
    state.debt = math.max(state.debt, (now - state.at) / 1e6 + owed)
  end,
  keep_s = function(_, state) return debt(state) + RATE_KEEP_S end,
}

-- A level is {holds}: {units, when that lapses} by replica; the nameless one is the unknown.
kinds[LEVEL] = {
  new = function() return {holds = {}} end,
  load = function(_, state)
    for name, hold in pairs(state.holds) do
      if hold[2] <= now then state.holds[name] = nil end
    end
  end,
  free = function(limit, state)
    local held = 0
    for _, hold in pairs(state.holds) do held = held + hold[1] end
    return limit.burst - held
  end,
  wait = function(limit, state, units)
    return units > kinds[LEVEL].free(limit, state) and math.huge or 0
  end,
  charge = function(_, state, units)
    local hold = state.holds[replica]
    local held = (hold and hold[1] or 0) + units
    if held > 0 then state.holds[replica] = {held, now + lease_s * 1e6} end
    return 0
  end,
  give_back = function(limit, state, units)
    local unknown = state.holds['']
    if unknown and not state.holds[replica] then
      unknown[1] = math.max(unknown[1] - units, 0)
    end
    state.holds[replica] = nil
    kinds[LEVEL].charge(limit, state, units)
  end,
  lower = function(limit, state, free)
    local unknown = kinds[LEVEL].free(limit, state) - free
    if unknown > 0 then
      local before = state.holds['']
      state.holds[''] = {(before and before[1] or 0) + unknown, now + PHANTOM_S * 1e6}
    end
  end,
  keep_s = function() return lease_s end,
}

-- A month is {used}; its key names it.
kinds[MONTH] = {
  new = function() return {used = 0} end,
  load = function() end,
  free = function(limit, state) return limit.burst - state.used end,
  wait = function(limit, state, units)
    return units > limit.burst - state.used and math.huge or 0
  end,
  charge = function(_, state, units)
    state.used = state.used + units
    return 0
  end,
  give_back = function(_, state, units, mark)
    state.used = math.max(state.used - units, 0)
    if units == 0 then state.used = math.max(state.used, mark) end -- the Store counted so much
  end,
  lower = function(limit, state, free)
    state.used = math.max(state.used, limit.burst - free)
  end,
  keep_s = function() return MONTH_KEEP_S end,
}

local limits = {}
for i = 2, #KEYS do
  local kind, burst, interval = struct.unpack('<ddd', ARGV[3], (i - 2) * 24 + 1)
  local limit = {key = KEYS[i], does = kinds[kind], kind = kind, burst = burst, interval = interval}
  local kept = redis.call('GET', limit.key)
  if kept then
    limit.state = cmsgpack.unpack(kept)
    limit.does.load(limit, limit.state)
  end
  limits[i - 2] = limit
end

-- The limit's state; a new one is full, and young for a lease: who has told its hint is noted, and
-- what was charged since.
local function find(limit)
  if not limit.state then
    limit.state = limit.does.new(limit)
    limit.state.young = {born = now, charged = 0, heard = {}}
  end
  if limit.state.young and now > limit.state.young.born + lease_s * 1e6 then
    limit.state.young = nil
  end
  return limit.state
end

local function charged(state, units)
  if state.young then state.young.charged = state.young.charged + units end
end

local function take_back(limit, units, mark)
  local uses = units < 0
  if limit.kind == LEVEL then uses = units > 0 end
  if limit.kind == MONTH then uses = units <= 0 end
  if not uses and not limit.state then
    return -- forgotten, so full: a return must not become a credit
  end
  local state = find(limit)
  limit.does.give_back(limit, state, units, mark)
  limit.changed = true
  if limit.kind ~= LEVEL then charged(state, -math.min(units, 0)) end
end

local function known(state)
  local held = 0
  for name, hold in pairs(state.holds) do
    if name ~= '' then held = held + hold[1] end
  end
  return held
end

local function hear(limit, hint)
  local state = find(limit)
  local young = state.young
  if young and not young.heard[replica] then
    if hint == hint then
      local since = young.charged
      if limit.kind == LEVEL then since = math.min(since, known(state)) end -- units come back to it
      limit.does.lower(limit, state, math.min(hint, limit.burst) - since)
    end
    young.heard[replica] = true
    limit.changed = true
  end
end

local function answer(lines, reply)
  local refused, longest = -1, 0
  for _, line in ipairs(lines) do
    hear(line.limit, line.hint)
    line.free = line.limit.does.free(line.limit, line.limit.state)
  end
  for at, line in ipairs(lines) do
    local wait = line.need ~= 0 and line.limit.does.wait(line.limit, line.limit.state, line.need)
    if wait and wait > longest then refused, longest = at - 1, wait end
  end
  reply[#reply + 1] = struct.pack('<dd', refused, longest)
  for _, line in ipairs(lines) do
    local units, mark = 0, 0
    if refused < 0 then
      local extra = math.min(line.want - line.need, (line.free - line.need) * EXTRA_SHARE)
      units = line.need + math.max(math.floor(extra + EPSILON), 0)
      if units ~= 0 then
        mark = line.limit.does.charge(line.limit, line.limit.state, units)
        line.limit.changed = true
      end
      charged(line.limit.state, units)
    end
    reply[#reply + 1] = struct.pack('<ddd', units, line.free - units, mark)
  end
end

for at = 1, #ARGV[4], 24 do
  local index, units, mark = struct.unpack('<ddd', ARGV[4], at)
  take_back(limits[index], units, mark)
end

local reply, at = {struct.pack('<d', now)}, 1
while at <= #ARGV[5] do
  local lines, count = {}, 0
  count, at = struct.unpack('<d', ARGV[5], at)
  for i = 1, count do
    local index, need, want, hint
    index, need, want, hint, at = struct.unpack('<dddd', ARGV[5], at)
    lines[i] = {limit = limits[index], need = need, want = want, hint = hint}
  end
  answer(lines, reply)
end

for _, limit in pairs(limits) do
  if limit.changed then
    local keep_ms = math.ceil(limit.does.keep_s(limit, limit.state) * 1000)
    redis.call('SET', limit.key, cmsgpack.pack(limit.state), 'PX', keep_ms)
  end
end
local whole = table.concat(reply)
redis.call('SET', KEYS[1], whole, 'PX', math.ceil(lease_s * 1000))
return whole
