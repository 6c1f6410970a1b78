-- For wrk: completions, whole and streamed by turns; in the end what came, as a line of JSON.
ok, refused, other = 0, 0, 0
last_other = ""
local turn = 0
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function request()
  turn = turn + 1
  local body = string.format('{"prompt": "request %d", "max_tokens": 8, "ignore_eos": true, "stream": %s}', turn, tostring(turn % 2 == 0))
  return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, body)
end

function response(status, headers, body)
  if status == 200 and (body:find("data: [DONE]", 1, true) or body:find('"finish_reason":"length"', 1, true)) then
    ok = ok + 1
  elseif status == 429 and (headers["retry-after"] or headers["Retry-After"]) then
    refused = refused + 1
  else
    other = other + 1
    last_other = status .. " " .. body:sub(1, 200):gsub("[%c\"\\]", " ")
  end
end

function done(summary)
  local sum = { ok = 0, refused = 0, other = 0 }
  local told = ""
  for _, thread in ipairs(threads) do
    for name in pairs(sum) do
      sum[name] = sum[name] + thread:get(name)
    end
    told = thread:get("last_other")
  end
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format('{"ok": %d, "refused": %d, "other": %d, "last_other": "%s", "broken": %d, "seconds": %.3f}', sum.ok, sum.refused,
    sum.other, told, broken, summary.duration / 1e6))
end
